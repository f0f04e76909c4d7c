"""A ``LightningDataModule`` as the data of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader

from lightning_gradmetrics.cli.data.sets import EvaluationData

__all__ = ["data_of_module", "datamodule"]


def datamodule(module: LightningDataModule, roles: Mapping[str, str] | None = None) -> EvaluationData:
    """Return the test dataloaders of a data module as datasets; fitted scores are fitted on its validation data.

    Args:
        module: The data module.
        roles: The name and role of each test dataloader, in order, as ``{"cifar10": "id", "svhn": "far"}``.
    """
    return data_of_module(module, roles)


def data_of_module(module: LightningDataModule, roles: Mapping[str, str] | None = None) -> EvaluationData:
    """Return the data of a data module; without ``roles``, its attribute ``roles`` is used if it has one.

    Raises:
        ValueError: If it has no test dataloader, or several whose roles are unknown.
    """
    module.prepare_data()
    module.setup("test")
    loaders = _named("test", module.test_dataloader())
    roles = roles or getattr(module, "roles", None)
    if roles is None and len(loaders) > 1:
        raise ValueError(
            f"{type(module).__name__} has {len(loaders)} test dataloaders without roles: use data=datamodule with "
            "data.roles={cifar10: id, svhn: far}, or give the module an attribute roles"
        )
    roles = dict(roles or dict.fromkeys(loaders, "id"))
    if len(roles) != len(loaders):
        raise ValueError(f"{len(roles)} roles for {len(loaders)} test dataloaders of {type(module).__name__}: {roles}")
    fit = {}
    if _overrides(module, "val_dataloader"):
        module.setup("validate")
        fit = _named("validation", module.val_dataloader())
    return EvaluationData(dict(zip(roles, loaders.values(), strict=True)), roles, fit=fit)


def _overrides(module: LightningDataModule, name: str) -> bool:
    return getattr(type(module), name) is not getattr(LightningDataModule, name)


def _named(name: str, loaders: Any) -> dict[str, Any]:
    """Return the dataloaders by name; without names, they are numbered."""
    if isinstance(loaders, CombinedLoader):
        loaders = loaders.iterables
    if isinstance(loaders, Mapping):
        return dict(loaders)
    if not isinstance(loaders, Sequence):
        return {name: loaders}
    if len(loaders) == 1:
        return {name: loaders[0]}
    return {f"{name}_{number}": loader for number, loader in enumerate(loaders)}
