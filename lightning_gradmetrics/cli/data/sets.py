"""What an experiment is run on: named data sets with roles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader, Dataset

__all__ = ["EvaluationData"]


@dataclass(frozen=True)
class EvaluationData:
    """Named data sets with roles, and what the model was trained on where that is at hand.

    Args:
        sets: The data sets to score, by name.
        roles: The role of each: ``"id"``, or a group of out-of-distribution sets such as ``"near"``.
        classes: The names of the classes, in the order of the labels.
        train: Training data, for a model that is trained on the spot; fitted scores fall back on it.
        descriptions: A few words on each data set.
        fit: What fitted scores are fitted on, by name: data that are neither trained on nor scored.
        fit_roles: The role of each of them, as in ``roles``; all are in-distribution without it.
    """

    sets: Mapping[str, Dataset[Any]]
    roles: Mapping[str, str]
    classes: tuple[str, ...]
    train: Dataset[Any] | None = None
    descriptions: Mapping[str, str] = field(default_factory=dict)
    fit: Mapping[str, Dataset[Any]] = field(default_factory=dict)
    fit_roles: Mapping[str, str] = field(default_factory=dict)

    def loaders(self, batch_size: int, num_workers: int = 0) -> dict[str, DataLoader[Any]]:
        """A dataloader for each data set, in order and without shuffling."""
        return _loaders(self.sets, batch_size, num_workers)

    def fit_loaders(self, batch_size: int, num_workers: int = 0) -> tuple[dict[str, DataLoader[Any]], dict[str, str]]:
        """Dataloaders of what fitted scores are fitted on, and their roles; else of the training data.

        Raises:
            ValueError: If there is neither.
        """
        sets = dict(self.fit) or ({} if self.train is None else {"train": self.train})
        if not sets:
            raise ValueError(
                "some of the scores are fitted before they are used, and there are no data to fit them on: give a "
                "folder of labelled images that are not scored, as in data.fit=PATH (or data.train=PATH), or leave them out"
            )
        return _loaders(sets, batch_size, num_workers), {name: self.fit_roles.get(name, "id") for name in sets}


def _loaders(sets: Mapping[str, Dataset[Any]], batch_size: int, num_workers: int) -> dict[str, DataLoader[Any]]:
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
    }
    return {name: DataLoader(dataset, **options) for name, dataset in sets.items()}
