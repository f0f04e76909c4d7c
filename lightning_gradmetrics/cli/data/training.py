"""Makes the training data the data to score, for an audit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lightning_gradmetrics.cli.data.sets import EvaluationData

__all__ = ["Relabelled", "training_data"]


class Relabelled(Dataset[tuple[Any, int]]):
    """A dataset of inputs and labels, with some labels replaced.

    Args:
        dataset: Returns ``(input, label)``.
        labels: The new labels, by the index of the sample.
    """

    def __init__(self, dataset: Dataset[Any], labels: Mapping[int, int]) -> None:
        self.dataset = dataset
        self.labels = dict(labels)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        inputs, label = self.dataset[index]
        return inputs, self.labels.get(index, int(label))


def training_data(source: EvaluationData, mislabelled: int = 0, seed: int = 0) -> EvaluationData:
    """Return the training data as the only dataset to score, to find odd and mislabelled samples.

    Args:
        source: Data with training samples.
        mislabelled: The number of randomly chosen samples that get a wrong label before the model is trained; the audit
            should find them.
        seed: The seed of the random choice.

    Raises:
        ValueError: If there is no training data, or it has fewer than ``mislabelled`` samples.

    Example:
        >>> from lightning_gradmetrics.cli.data import digits
        >>> data = training_data(digits(), mislabelled=2)
        >>> len(data.sets["train"]), sorted(data.planted["train"])
        (120, [76, 101])
    """
    if source.train is None:
        raise ValueError("the data has no training set to audit: give one, as in data.source.train=PATH")
    size = len(source.train)  # type: ignore[arg-type]
    if not 0 <= mislabelled <= size:
        raise ValueError(f"mislabelled is {mislabelled}; expected 0 to {size}, the number of training samples")
    train, words, planted = source.train, "the training data", {}
    if mislabelled:
        train = _with_wrong_labels(source.train, mislabelled, len(source.classes), seed)
        planted["train"] = frozenset(train.labels)
        words += f"; {mislabelled} wrong labels were planted, at {', '.join(map(str, sorted(train.labels)))}"
    return EvaluationData(
        {"train": train},
        {"train": "id"},
        source.classes,
        train,
        {"train": words},
        source.fit,
        source.fit_roles,
        planted,
    )


def _with_wrong_labels(dataset: Dataset[Any], count: int, classes: int, seed: int) -> Relabelled:
    generator = np.random.default_rng(seed)
    chosen = sorted(generator.choice(len(dataset), count, replace=False).tolist())  # type: ignore[arg-type]
    steps = generator.integers(1, classes, count).tolist()
    labels = {}
    for index, step in zip(chosen, steps, strict=True):
        labels[index] = (int(dataset[index][1]) + step) % classes
    return Relabelled(dataset, labels)
