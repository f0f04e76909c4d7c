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
        train: Training data, for a model that is trained on the spot, or for fitted scores.
        descriptions: A few words on each data set.
    """

    sets: Mapping[str, Dataset[Any]]
    roles: Mapping[str, str]
    classes: tuple[str, ...]
    train: Dataset[Any] | None = None
    descriptions: Mapping[str, str] = field(default_factory=dict)

    def loaders(self, batch_size: int, num_workers: int = 0) -> dict[str, DataLoader[Any]]:
        """A dataloader for each data set, in order and without shuffling."""
        options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "persistent_workers": num_workers > 0}
        return {name: DataLoader(dataset, **options) for name, dataset in self.sets.items()}
