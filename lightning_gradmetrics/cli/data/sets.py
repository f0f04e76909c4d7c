"""The data of a run: named datasets with roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader, Dataset

__all__ = ["EvaluationData"]


@dataclass(frozen=True)
class EvaluationData:
    """Named datasets with roles, and the training data if it is available.

    Args:
        sets: The datasets to score, by name. A dataloader is used unmodified.
        roles: The role of each: ``"id"``, or a group of out-of-distribution sets such as ``"near"``.
        classes: The names of the classes, in the order of the labels; empty if they are unknown.
        train: Training data, for models that the command trains. Fitted scores use it if there is no ``fit``.
        descriptions: A short description of each dataset.
        fit: The datasets that scores are fitted on, by name; they are neither trained on nor scored.
        fit_roles: The roles of the datasets in ``fit``, as in ``roles``; by default all are in-distribution.
        planted: The indices of samples that were mislabelled on purpose, by dataset.
    """

    sets: Mapping[str, Dataset[Any] | DataLoader[Any]]
    roles: Mapping[str, str]
    classes: tuple[str, ...] = ()
    train: Dataset[Any] | None = None
    descriptions: Mapping[str, str] = field(default_factory=dict)
    fit: Mapping[str, Dataset[Any] | DataLoader[Any]] = field(default_factory=dict)
    fit_roles: Mapping[str, str] = field(default_factory=dict)
    planted: Mapping[str, frozenset[int]] = field(default_factory=dict)

    def loaders(self, batch_size: int, num_workers: int = 0) -> dict[str, DataLoader[Any]]:
        """Return a dataloader for each dataset, in order and without shuffling."""
        return _loaders(self.sets, batch_size, num_workers)

    def fit_loaders(
        self, batch_size: int, num_workers: int = 0, scores: Sequence[str] = ()
    ) -> tuple[dict[str, DataLoader[Any]], dict[str, str]]:
        """Return dataloaders of the data that scores are fitted on (or else of the training data), and their roles.

        Args:
            batch_size: Samples per batch.
            num_workers: Worker processes of each dataloader.
            scores: The names of the scores, for the error message.

        Raises:
            ValueError: If there is neither fit data nor training data.
        """
        sets = dict(self.fit) or ({} if self.train is None else {"train": self.train})
        if not sets:
            names = ", ".join(scores) or "some of the scores"
            raise ValueError(
                f"no data to fit scores on ({names}): give labelled samples that are not scored, "
                "as in data.fit=PATH or data.train=PATH, or choose scores that need no fit, as in 'score=[max_softmax,energy]'"
            )
        roles = {name: self.fit_roles.get(name, "id") for name in sets}
        return _loaders(sets, batch_size, num_workers), roles


def _loaders(sets: Mapping[str, Any], batch_size: int, num_workers: int) -> dict[str, DataLoader[Any]]:
    loaders = {}
    for name, dataset in sets.items():
        if not isinstance(dataset, DataLoader):
            dataset = DataLoader(
                dataset, batch_size=batch_size, num_workers=num_workers, persistent_workers=num_workers > 0
            )
        loaders[name] = dataset
    return loaders
