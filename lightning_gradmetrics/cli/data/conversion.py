"""Converts the return value of a data factory to the data of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule

from lightning_gradmetrics.cli.data.datamodule import data_of_module
from lightning_gradmetrics.cli.data.sets import EvaluationData

__all__ = ["evaluation_data"]

TRAIN, FIT = "train", "fit"
"""Keys of a mapping that are not roles: the training data, and data to fit scores on."""


def evaluation_data(made: Any, source: str) -> EvaluationData:
    """Return the data that a factory made, in the form that the command uses.

    Args:
        made: An :class:`EvaluationData`; a ``LightningDataModule``; or a mapping from role to a dataset, or from role to
            ``{name: dataset}``, with the optional keys ``train`` and ``fit``.
        source: The name of the factory, for error messages.

    Raises:
        TypeError: If it is of any other type.
        ValueError: If there is no in-distribution data, or a name appears twice.

    Example:
        >>> data = evaluation_data({"id": [(0.1, 0)], "far": {"svhn": [(0.2, -1)]}}, "mine.data")
        >>> dict(data.roles)
        {'id': 'id', 'svhn': 'far'}
    """
    if isinstance(made, LightningDataModule):
        made = data_of_module(made)
    if isinstance(made, Mapping):
        made = _data_of_mapping(made, source)
    if not isinstance(made, EvaluationData):
        raise TypeError(
            f"data._target_={source} must return an EvaluationData, a LightningDataModule or a mapping from role to "
            f"dataset, such as {{'id': test_set, 'far': {{'svhn': svhn}}}}; got {type(made).__name__}"
        )
    if "id" not in made.roles.values():
        raise ValueError(f"{source} has no in-distribution data: give one dataset the role 'id'")
    return made


def _data_of_mapping(made: Mapping[str, Any], source: str) -> EvaluationData:
    sets: dict[str, Any] = {}
    roles: dict[str, str] = {}
    for role, members in made.items():
        if role in (TRAIN, FIT):
            continue
        for name, dataset in _by_name(role, members).items():
            if name in sets:
                raise ValueError(f"{source} has two datasets named {name!r}: rename one")
            if not hasattr(dataset, "__getitem__") and not hasattr(dataset, "__iter__"):
                raise TypeError(f"{source}: {name!r} must be a dataset, got {type(dataset).__name__}")
            sets[name], roles[name] = dataset, role
    fit = _by_name(FIT, made[FIT]) if FIT in made else {}
    return EvaluationData(sets, roles, train=made.get(TRAIN), fit=fit)


def _by_name(role: str, members: Any) -> Mapping[str, Any]:
    return members if isinstance(members, Mapping) else {role: members}
