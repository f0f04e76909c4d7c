"""The dataloaders of a run: the names and the roles of their data sets, and the rows that each will give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_gradmetrics.callback.processes import Processes
from lightning_gradmetrics.results.table import Rows, sample_indices

__all__ = ["dataset_names", "dataset_roles", "loader_list", "rows_of_loaders"]

Names = Sequence[str] | Mapping[str, str] | None
"""The data sets' names, or their roles by name, or nothing: what a user gives as ``datasets``."""


def loader_list(dataloaders: Any) -> list[Any]:
    """One dataloader or several, a list or a mapping, as a list.

    Example:
        >>> loader_list({"a": [1], "b": [2]})
        [[1], [2]]
    """
    if isinstance(dataloaders, Mapping):
        return list(dataloaders.values())
    return list(dataloaders) if isinstance(dataloaders, (list, tuple)) else [dataloaders]


def dataset_names(datasets: Names, dataloaders: Any) -> list[str]:
    """The data sets' names, in the order of the dataloaders.

    Raises:
        ValueError: If their number is not that of the dataloaders.

    Example:
        >>> dataset_names({"mine": "id", "other": "far"}, ["first loader", "second loader"])
        ['mine', 'other']
    """
    keys = list(dataloaders) if isinstance(dataloaders, Mapping) else None
    count = len(loader_list(dataloaders))
    if datasets is None:
        return keys or [f"dataloader_{i}" for i in range(count)]
    names = list(datasets)
    if keys is not None and isinstance(datasets, Mapping) and set(keys) == set(names):
        return keys
    if len(names) != count or len(set(names)) != count:
        raise ValueError(
            f"datasets= names {len(names)} data sets ({', '.join(names)}), and there are {count} dataloaders"
            + (f" ({', '.join(map(str, keys))})" if keys else "")
            + "; give each dataloader one name of its own, in their order"
        )
    return names


def dataset_roles(datasets: Names, names: Sequence[str]) -> dict[str, str]:
    """Each data set's role; without roles all are in-distribution.

    Example:
        >>> dataset_roles(["a", "b"], ["a", "b"])
        {'a': 'id', 'b': 'id'}
    """
    return dict(datasets) if isinstance(datasets, Mapping) else dict.fromkeys(names, "id")


def rows_of_loaders(datasets: Names, dataloaders: Any, scores: Sequence[str], processes: Processes) -> list[Rows]:
    """Room for each dataloader's rows; where rows that a sampler repeats cannot be told, a warning says so."""
    world, rank = processes.count, processes.rank
    rows = [
        Rows(name, scores, sample_indices(loader, rank, world), world, rank)
        for name, loader in zip(dataset_names(datasets, dataloaders), loader_list(dataloaders), strict=True)
    ]
    unknown = [part.dataset for part in rows if part.indices is None]
    if world > 1 and unknown:
        processes.warn(
            f"the order of {', '.join(unknown)} is not known beforehand (its sampler is neither sequential nor distributed): "
            "index is the position in the run, and rows that a sampler repeated to fill up cannot be told"
        )
    return rows
