"""Describes everything that the results depend on; stored with them and compared when a run is resumed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_gradmetrics.evaluation import Thresholds
from lightning_gradmetrics.results.identity import batch_size_of, describe_loader, tensors_hash, weights_hash
from lightning_gradmetrics.scores import FittedScore, Score
from lightning_gradmetrics.scoring.scorer import Scorer

__all__ = ["describe_circumstances", "describe_run"]

PACKAGES = ("lightning-gradmetrics", "torch", "lightning", "numpy", "pyarrow")


def describe_run(
    scorer: Scorer,
    model: nn.Module,
    loaders: Mapping[str, Any],
    roles: Mapping[str, str],
    thresholds: Thresholds | None,
    callables: Mapping[str, Any],
) -> dict[str, Any]:
    """Return everything that the results of a run depend on, as plain values.

    Args:
        scorer: Computes the scores.
        model: The scored model.
        loaders: The dataloaders by the names of their datasets.
        roles: The role of each dataset.
        thresholds: The thresholds, or ``None``.
        callables: Other arguments that change the results: functions and names.
    """
    scores, datasets = {}, {}
    for score in scorer.scores:
        scores[score.name] = describe_score(score)
    for name, loader in loaders.items():
        datasets[name] = describe_loader(loader)
    return {
        "model": {"kind": type(model).__qualname__, "weights": weights_hash(model)},
        "scores": scores,
        "head": scorer.head,
        "engine": scorer.engine,
        **{name: described(value) for name, value in callables.items()},
        "thresholds": None if thresholds is None else json.loads(thresholds.to_json()),
        "roles": {name: roles[name] for name in loaders},
        "datasets": datasets,
    }


def describe_score(score: Score) -> dict[str, Any]:
    """Return the method, arguments and fitted state of a score.

    The tensors of a state are hashed in the order of their names, since a file of states does not keep another order.
    """
    arguments = {}
    for name, value in {**score.recipe.defaults, **score.arguments}.items():
        arguments[name] = described(value)
    is_fitted = isinstance(score, FittedScore) and score.state is not None
    return {
        "method": score.recipe.name,
        "arguments": arguments,
        "state": tensors_hash(sorted(score.state.items())) if is_fitted else None,  # type: ignore[attr-defined]
    }


def described(value: Any) -> Any:
    """Return a value as JSON can store it; functions and objects by name, because addresses differ between runs.

    All lambdas in a function have the same name, so a hash of a lambda's code is added.
    """
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, Mapping):
        return {str(key): described(inner) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return list(map(described, value))
    name: str = getattr(value, "__qualname__", type(value).__qualname__)
    code = getattr(value, "__code__", None)
    if name.endswith("<lambda>") and code is not None:
        parts = (code.co_code, code.co_names, tuple(filter(_is_plain, code.co_consts)))
        return f"{name} {hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"
    return name


def _is_plain(constant: Any) -> bool:
    return isinstance(constant, (str, bytes, int, float, bool, type(None)))


def describe_circumstances(loaders: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """Return settings that may differ in a resumed run: they change scores by rounding errors at most.

    Args:
        loaders: The dataloaders by the names of their datasets.
        processes: The number of processes.
    """
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    sizes = {name: batch_size_of(loader) for name, loader in loaders.items()}
    return {"versions": versions, "batch_size": sizes, "processes": processes}
