"""Builds data, model and scores from the configuration, including the user's functions and classes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

from hydra.utils import instantiate
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_gradmetrics.cli.configuration import configuration_directory, option_names
from lightning_gradmetrics.cli.data.conversion import evaluation_data
from lightning_gradmetrics.cli.data.sets import EvaluationData
from lightning_gradmetrics.cli.models.classifier import Classifier
from lightning_gradmetrics.scores import Score
from lightning_gradmetrics.scoring.registry import make, resolve

__all__ = ["build_data", "build_model", "build_scores"]


def build_scores(config: DictConfig, every: bool = False) -> tuple[Score, ...]:
    """Return the scores of a configuration, named by their keys.

    Args:
        config: The composed configuration; ``score`` has the chosen scores by name.
        every: Whether to add all other scores of ``conf/score``.

    Raises:
        ValueError: If no score is chosen, or one cannot be built from its arguments.
    """
    chosen = list(config.get("score") or {})
    if every:
        shipped = _shipped_scores()
        config = cast(DictConfig, OmegaConf.merge({"score": shipped}, config))
        chosen += [name for name in shipped if name not in chosen]
    made: dict[str, Any] = {}
    for name in chosen:
        try:
            made[str(name)] = _score(config.score[name])
        except Exception as error:
            raise ValueError(f"score.{name}: {error.__cause__ or error}") from error
    return resolve(made)


def _score(node: Any) -> Any:
    """Return the score of a node; its target makes a score, or is a plain function of the evidence."""
    target = _located(str(node._target_)) if isinstance(node, DictConfig) and node.get("_target_") else None
    if not inspect.isfunction(target) or not _takes_evidence(target):
        return instantiate(node)
    made = instantiate(node, _partial_=True, _convert_="all")
    return make(made.func, **made.keywords)


def _takes_evidence(function: Callable[..., Any]) -> bool:
    """Return whether a function's first parameter is positional and has no default."""
    first = next(iter(_parameters(function).values()), None)
    return first is not None and first.default is first.empty and first.kind is first.POSITIONAL_OR_KEYWORD


def _shipped_scores() -> dict[Any, Any]:
    """Return the nodes of ``conf/score`` by name, without those that lack a mandatory argument."""
    shipped = {}
    for name in option_names("score"):
        for key, node in OmegaConf.load(configuration_directory() / "score" / f"{name}.yaml").items():
            if not any(OmegaConf.is_missing(node, argument) for argument in node):
                shipped[key] = node
    return shipped


def build_data(node: DictConfig) -> EvaluationData:
    """Return the data made by ``data._target_``.

    Args:
        node: ``_target_``, a function or class, and its arguments. It returns an
            :class:`~lightning_gradmetrics.cli.data.EvaluationData`, a ``LightningDataModule``, or a mapping from role to
            dataset, such as ``{"id": test_set, "far": {"svhn": svhn}}``.

    Raises:
        ValueError: If the target is missing or cannot be imported.
        TypeError: If it returns any other type.
    """
    _target_of(node, "data")
    made = instantiate(node, _convert_="all")
    return evaluation_data(made, str(node._target_))


def build_model(node: DictConfig, data: EvaluationData) -> LightningModule:
    """Return the model made by ``model._target_``, as a module that a ``Trainer`` can test.

    Args:
        node: ``_target_``, a function or class, and its arguments. It returns an ``nn.Module`` from inputs to logits
            ``(N, C)``. If it has an argument named ``data``, the run's data is passed to it.
        data: The run's data.

    Returns:
        A ``LightningModule`` in eval mode. A ``LightningModule`` without a ``forward`` method is used unmodified,
        including its ``test_step``; any other module is called with the inputs of each batch.

    Raises:
        ValueError: If the target is missing or cannot be imported.
        TypeError: If it does not return an ``nn.Module``.
    """
    target = _target_of(node, "model")
    extra = {"data": data} if "data" in _parameters(target) else {}
    made = instantiate(node, _partial_=True)(**extra)
    if not isinstance(made, nn.Module):
        raise TypeError(f"model._target_={node._target_} must return an nn.Module, got {type(made).__name__}")
    return _as_lightning_module(made).eval()


def _as_lightning_module(made: nn.Module) -> LightningModule:
    has_forward = type(made).forward is not LightningModule.forward
    if isinstance(made, Classifier) or (isinstance(made, LightningModule) and not has_forward):
        return made
    return Classifier(made)


def _target_of(node: DictConfig, key: str) -> Any:
    """Return the function or class of a node.

    Raises:
        ValueError: If the target is missing, or cannot be imported.
    """
    if not isinstance(node, DictConfig) or OmegaConf.is_missing(node, "_target_") or not node.get("_target_"):
        raise ValueError(
            f"{key}._target_ is missing: give the path of a function or class, as in {key}._target_=mine.make"
        )
    try:
        return _located(str(node._target_))
    except Exception as error:
        raise ValueError(f"{key}._target_={node._target_} cannot be imported: {error}") from error


def _located(path: str) -> Any:
    """Return the object at a dotted path; attributes take precedence over submodules, as in Hydra."""
    names = path.split(".")
    target = importlib.import_module(names[0])
    for end, name in enumerate(names[1:], 2):
        if not hasattr(target, name):
            importlib.import_module(".".join(names[:end]))
        target = getattr(target, name)
    return target


def _parameters(target: Any) -> Mapping[str, Any]:
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):  # some C functions have no signature
        return {}
