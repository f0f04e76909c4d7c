"""The dataloaders of a run: the names and roles of their datasets, and the rows of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_gradmetrics.callback.processes import Processes
from lightning_gradmetrics.results.rows import Rows
from lightning_gradmetrics.results.sample_index import SampleIndex

__all__ = [
    "STAGES",
    "Datasets",
    "Names",
    "check_datasets",
    "check_stages",
    "dataset_names",
    "dataset_roles",
    "loader_list",
    "names_of_stage",
    "rows_of_loaders",
]

STAGES = ("fit", "validate", "test", "predict")
"""Stages that may be scored; ``fit`` is the validation during a fit."""

ID = "id"
"""The role of in-distribution data."""

MISSPELT_ID = ("ID", "Id", "iD", "in", "ind", "idd", "iid", "i.d.", "in-distribution", "in_distribution")
"""Spellings of ``id`` that are refused as names of groups of out-of-distribution sets."""

Names = Sequence[str] | Mapping[str, str] | None
"""The names of datasets, their roles by name, or ``None``."""

Datasets = Names | Mapping[str, Sequence[str] | Mapping[str, str]]
"""The argument ``datasets``: names for every stage, or names by stage."""


def check_stages(stages: Any) -> tuple[str, ...] | None:
    """Return the stages to score, checked; ``None`` for all.

    Raises:
        ValueError: If the list is empty, or a stage is unknown.
    """
    if stages is None:
        return None
    if isinstance(stages, Iterable):
        named = (stages,) if isinstance(stages, str) else tuple(stages)
    else:
        named = ()
    unknown = [stage for stage in named if stage not in STAGES]
    if unknown or not named:
        raise ValueError(
            f"stages={stages!r}; expected one or more of {', '.join(map(repr, STAGES))}, as in stages=('test', 'predict')"
        )
    return named


def check_datasets(datasets: Any) -> Datasets:
    """Return the names and roles of datasets, checked.

    Raises:
        TypeError: If they are neither a sequence nor a mapping of strings.
        ValueError: If a name or a role is invalid.
    """
    if datasets is None:
        return None
    if not _is_by_stage(datasets):
        checked: Names = _checked_names(datasets, "datasets")
        return checked
    by_stage = {}
    for stage, names in datasets.items():
        if stage not in STAGES:
            raise ValueError(
                f"datasets= has names for the stage {stage!r}; the stages are {', '.join(STAGES)}. For names of all stages pass "
                "a mapping from each name to its role, as in {'mine': 'id', 'other': 'far'}"
            )
        by_stage[stage] = _checked_names(names, f"datasets[{stage!r}]")
    return by_stage


def _is_by_stage(datasets: Any) -> bool:
    if not isinstance(datasets, Mapping) or not datasets:
        return False
    return all(isinstance(names, (Mapping, list, tuple)) for names in datasets.values())


def _checked_names(names: Any, argument: str) -> Any:
    if isinstance(names, str) or not isinstance(names, (Sequence, Mapping)):
        raise TypeError(
            f"{argument}={names!r}; expected a list of names, one per dataloader, or a mapping from each name to its role, as in "
            "{'mine': 'id', 'other': 'far'}"
        )
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{argument}= has the name {name!r}; expected a word for each dataset")
    if len(set(names)) != len(names):
        raise ValueError(
            f"{argument}= has the same name twice ({', '.join(names)}); give each dataset a different name"
        )
    if not names:
        raise ValueError(f"{argument}= is empty; expected one name per dataloader, or None")
    if isinstance(names, Mapping):
        _check_roles(names, argument)
        return dict(names)
    return list(names)


def _check_roles(roles: Mapping[str, Any], argument: str) -> None:
    for name, role in roles.items():
        if not isinstance(role, str) or not role.strip():
            raise ValueError(
                f"{argument}[{name!r}]={role!r}; a role is a word: 'id' for in-distribution data, or a group of "
                "out-of-distribution sets, such as 'near' or 'far'"
            )
        if role != ID and (role in MISSPELT_ID or role.strip() == ID):
            raise ValueError(f"{argument}[{name!r}]={role!r}; in-distribution data has the role 'id'")
        if name == ID and role != ID:
            raise ValueError(
                f"{argument}= has a dataset 'id' with the role {role!r}; 'id' is the role of in-distribution data: rename the dataset"
            )
        if role != ID and role in roles and roles[role] != role:
            raise ValueError(
                f"{argument}= has a dataset {role!r} and a group of that name, whose metrics would have one name: rename one"
            )


def names_of_stage(datasets: Datasets, stage: str) -> Names:
    """Return the names for one stage. The validation inside a fit uses those of ``validate`` if it has none.

    Example:
        >>> names_of_stage({"test": ["a", "b"]}, "test"), names_of_stage({"test": ["a", "b"]}, "fit")
        (['a', 'b'], None)
    """
    if not _is_by_stage(datasets):
        return datasets  # type: ignore[return-value]
    assert isinstance(datasets, Mapping)
    names = datasets.get(stage)
    if names is None and stage == "fit":
        names = datasets.get("validate")
    return names


def loader_list(dataloaders: Any, is_sequential: bool = True) -> list[Any]:
    """Return the dataloaders as a list; loaders that run side by side count as one.

    Example:
        >>> loader_list({"a": [1], "b": [2]}), loader_list({"a": [1], "b": [2]}, is_sequential=False)
        ([[1], [2]], [{'a': [1], 'b': [2]}])
    """
    if not is_sequential:
        return [dataloaders]
    if isinstance(dataloaders, Mapping):
        return list(dataloaders.values())
    return list(dataloaders) if isinstance(dataloaders, (list, tuple)) else [dataloaders]


def dataset_names(names: Names, dataloaders: Any, is_sequential: bool = True, stage: str = "the run") -> list[str]:
    """Return the names of the datasets, in the order of the dataloaders.

    Raises:
        ValueError: If their number differs from that of the dataloaders.

    Example:
        >>> dataset_names({"mine": "id", "other": "far"}, ["first loader", "second loader"])
        ['mine', 'other']
    """
    keys = list(map(str, dataloaders)) if isinstance(dataloaders, Mapping) and is_sequential else None
    count = len(loader_list(dataloaders, is_sequential))
    if names is None:
        return keys or [f"dataloader_{number}" for number in range(count)]
    names_given = list(names)
    if keys is not None and set(keys) == set(names_given):
        return keys
    if len(names_given) != count:
        have = "1 dataloader" if count == 1 else f"{count} dataloaders"
        raise ValueError(
            f"datasets= names {len(names_given)} datasets ({', '.join(names_given)}), but {stage} has {have}"
            + (f" ({', '.join(keys)})" if keys else "")
            + ". Pass one name per dataloader, in order; names by stage, as in datasets={'test': {...}}; or stages=, the "
            "stages to score"
        )
    return names_given


def dataset_roles(names: Names, dataset_list: Sequence[str]) -> dict[str, str]:
    """Return the role of each dataset; without roles all are in-distribution.

    Example:
        >>> dataset_roles(["a", "b"], ["a", "b"])
        {'a': 'id', 'b': 'id'}
    """
    return dict(names) if isinstance(names, Mapping) else dict.fromkeys(dataset_list, ID)


def rows_of_loaders(
    datasets: Sequence[str],
    loaders: Sequence[Any],
    scores: Sequence[str],
    processes: Processes,
    vectors: Sequence[str] = (),
    has_ids: bool = False,
) -> list[Rows]:
    """Return an empty table for the rows of each dataloader.

    Args:
        datasets: The names of the datasets.
        loaders: Their dataloaders.
        scores: The names of the score columns.
        processes: The processes of the run.
        vectors: The names of further columns.
        has_ids: Whether each row has a sample id.
    """
    rows = []
    for name, loader in zip(datasets, loaders, strict=True):
        index = SampleIndex.of(loader, processes.rank, processes.count)
        rows.append(Rows(name, scores, index, vectors=vectors, has_ids=has_ids))
    return rows
