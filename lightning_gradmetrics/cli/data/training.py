"""The training data as what is scored: an audit of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lightning_gradmetrics.cli.data.sets import EvaluationData

__all__ = ["Relabelled", "training_data"]


class Relabelled(Dataset[tuple[Any, int]]):
    """A data set of inputs and labels, some of whose labels are others.

    Args:
        dataset: Gives ``(input, label)``.
        labels: The other labels, by the sample's index.
    """

    def __init__(self, dataset: Dataset[Any], labels: Mapping[int, int]) -> None:
        self.dataset = dataset
        self.labels = dict(labels)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        inputs, label = self.dataset[index]
        return inputs, self.labels.get(index, int(label))


def training_data(data: EvaluationData, mislabelled: int = 0, seed: int = 0) -> EvaluationData:
    """The training data of a data set as the one data set that is scored, to look for odd and mislabelled samples.

    Args:
        data: Data with training samples.
        mislabelled: How many samples, chosen at random, get another class for their label, before a model is trained
            on them: an audit should find them. Their indices are in the description.
        seed: Of that choice.

    Raises:
        ValueError: If there are no training data, or fewer than ``mislabelled``.

    Example:
        >>> from lightning_gradmetrics.cli.data import digits
        >>> data = training_data(digits(), mislabelled=2)
        >>> len(data.sets["train"]), data.descriptions["train"]
        (120, 'the training data; 2 labels were made wrong, of the samples 76, 101')
    """
    if data.train is None:
        raise ValueError("the data hold no training data to look at: give some, as in data.data.train=PATH")
    size, words = len(data.train), "the training data"  # type: ignore[arg-type]
    if not 0 <= mislabelled <= size:
        raise ValueError(f"mislabelled is {mislabelled}; expected from 0 to {size}, the number of training samples")
    train: Dataset[Any] = data.train
    if mislabelled:
        generator, classes = np.random.default_rng(seed), len(data.classes)
        chosen = sorted(generator.choice(size, mislabelled, replace=False).tolist())
        steps = generator.integers(1, classes, mislabelled).tolist()
        train = Relabelled(train, {i: (int(train[i][1]) + s) % classes for i, s in zip(chosen, steps, strict=True)})
        words += f"; {mislabelled} labels were made wrong, of the samples {', '.join(map(str, chosen))}"
    return EvaluationData(
        {"train": train}, {"train": "id"}, data.classes, train, {"train": words}, data.fit, data.fit_roles
    )
