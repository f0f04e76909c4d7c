"""Feature vectors of per-sample gradients: statistics over all parameters, per layer, or per parameter."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import Inputs
from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.gradients.objectives import Loss, Objective
from lightning_gradmetrics.scoring.evidence import ParameterGradients

__all__ = ["FEATURES", "LEVELS", "feature_columns", "feature_names", "gradient_features", "several"]

FEATURES = ("max", "min", "mean", "std", "l1", "l2")
"""The statistics of Oberdiek et al."""

LEVELS = ("all", "layer", "parameter")
"""The parameters that one statistic covers: all, those of a layer, or each separately."""


def several(names: str | Iterable[str]) -> tuple[str, ...]:
    """Return the names in ``"all+layer"``, or in a sequence of names.

    Example:
        >>> several("all+layer")
        ('all', 'layer')
    """
    return tuple(names.split("+")) if isinstance(names, str) else tuple(names)


def _groups(gradient: ParameterGradients, levels: Iterable[str]) -> list[tuple[Any, tuple[str, ...]]]:
    """Return, for each level, the gradients and the names of their groups of parameters."""
    groups: list[tuple[Any, tuple[str, ...]]] = []
    for level in levels:
        if level not in LEVELS:
            raise ValueError(
                f"unknown level {level!r}; available: {', '.join(LEVELS)}, and several of them as in 'all+layer'"
            )
        if level == "all":
            groups.append((gradient.merged(), ("all",)))
        else:
            taken = gradient.by_layer() if level == "layer" else gradient
            groups.append((taken, taken.names))
    return groups


def feature_columns(
    gradient: ParameterGradients, levels: Iterable[str], statistics: Sequence[str] = FEATURES
) -> Tensor:
    """Return statistics of gradients ``(N, F)``, ordered by level, then group, then statistic."""
    columns = []
    for taken, _ in _groups(gradient, levels):
        values = [taken.statistic(name) for name in statistics]
        columns.append(torch.stack(values, -1).flatten(1))
    return torch.cat(columns, 1)


def feature_names(
    gradient: ParameterGradients, levels: Iterable[str], statistics: Sequence[str] = FEATURES
) -> tuple[str, ...]:
    """Return the names of the columns, ``group/statistic``."""
    names = []
    for _, groups in _groups(gradient, levels):
        for group, statistic in itertools.product(groups, statistics):
            names.append(f"{group}/{statistic}")
    return tuple(names)


def gradient_features(
    model: nn.Module,
    inputs: Inputs,
    objectives: str | Sequence[str | Loss | Objective] = ("pseudo_label",),
    parameters: Callable[[str], bool] | None = None,
    *,
    levels: str | Sequence[str] = "all",
    statistics: Sequence[str] = FEATURES,
    **options: Any,
) -> tuple[Tensor, tuple[str, ...]]:
    r"""Return one vector of gradient statistics per sample, as features for a meta-classifier of errors.

    All objectives share one forward pass; each takes one backward pass.

    Args:
        model: A classifier; batch norms must be in eval mode. The model is left unchanged.
        inputs: A tensor ``(N, ...)``, a mapping (keyword arguments) or a sequence (positional arguments) of them.
        objectives: Objectives, as in :func:`lightning_gradmetrics.gradient_statistics`: ``"pseudo_label"``,
            ``"pseudo_label+uniform"``, or a sequence of names and callables.
        parameters: ``None`` for all, or a predicate on the parameter's name.
        levels: ``"all"`` (all parameters together), ``"layer"`` (the parameters of each layer together),
            ``"parameter"`` (each separately), or several, such as ``"all+layer"``.
        statistics: Names of statistics.
        **options: ``targets``, ``logits``, ``engine``, ``memory`` and ``sample_axis``, as in
            :func:`lightning_gradmetrics.gradient_statistics`.

    Returns:
        The features ``(N, F)``, and the names of their columns, ``objective/group/statistic``.

    Raises:
        ValueError: If a level, a statistic or an objective is unknown.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).eval()
        >>> x = torch.randn(5, 2, 4)
        >>> features, names = gradient_features(model, x, levels="all+parameter", statistics=("l1", "max"))
        >>> features.shape
        torch.Size([5, 6])
        >>> names[:3]
        ('pseudo_label/all/l1', 'pseudo_label/all/max', 'pseudo_label/1.weight/l1')

    Reference:
        Oberdiek, Rottmann, Gottschalk: Classification Uncertainty of Deep Neural Networks Based on Gradient
        Information, 2018.
    """
    named = several(objectives) if isinstance(objectives, str) else objectives
    made = list(map(Objective.of, named))
    gradients = gradient_statistics(
        model, inputs, made, parameters, per_parameter=True, statistics=statistics, **options
    )
    levels = several(levels)
    columns, names = [], []
    for objective, gradient in zip(made, gradients, strict=True):
        columns.append(feature_columns(gradient, levels, statistics))
        for name in feature_names(gradient, levels, statistics):
            names.append(f"{objective.name}/{name}")
    return torch.cat(columns, 1), tuple(names)
