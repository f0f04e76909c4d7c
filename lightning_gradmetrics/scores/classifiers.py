"""Classifiers of standardised features as tensors: what the fitted scores that learn two classes share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["classified", "column_scale", "regularised_logistic", "standardised"]

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""scikit-learn's ``C``, one over the weight of the penalty, that the inner cross-validation chooses from."""

SPLITS = 5
"""Parts of the inner cross-validation; fewer where the smaller class has fewer samples."""


def column_scale(features: Tensor, least: float = 0.0) -> dict[str, Tensor]:
    """Mean and standard deviation of each column, ``mean`` and ``scale`` ``(F,)``.

    Args:
        features: ``(M, F)``.
        least: A standard deviation that is not above it is rounding: the column's scale is then 1.
    """
    scale = features.std(0, correction=0)
    return {"mean": features.mean(0), "scale": torch.where(scale > least, scale, 1.0)}


def standardised(features: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The features ``(N, F)`` minus ``mean``, over ``scale``, of the state."""
    scaled: Tensor = (features.to(state["mean"].dtype) - state["mean"]) / state["scale"]
    return scaled


def classified(features: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The probability of the second class, ``(N,)``: logistic, behind a hidden layer if the state has one.

    Args:
        features: ``(N, F)``.
        state: ``mean``, ``scale``, ``weight`` and ``bias``; perhaps ``weight1`` ``(F, H)`` and ``bias1``.
    """
    hidden = standardised(features, state)
    if "weight1" in state:
        hidden = torch.relu(hidden @ state["weight1"] + state["bias1"])
    return torch.sigmoid(hidden @ state["weight"] + state["bias"])


def regularised_logistic(features: Tensor, target: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Logistic regression with an L2 penalty whose strength is chosen by stratified cross-validation of the log-loss.

    Args:
        features: ``(M, F)``, standardised.
        target: ``(M,)``, 0 or 1, two or more samples of each.
        seed: Of the cross-validation's parts.

    Returns:
        ``weight`` ``(F,)``, ``bias`` and ``strength``, the chosen ``C``.

    Example:
        >>> x = torch.linspace(-2, 2, 40, dtype=torch.float64)[:, None]
        >>> bool(regularised_logistic(x, (x[:, 0] > 0.1).long())["weight"] > 1)
        True
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    x, y = features.numpy(), target.numpy()
    with threadpool_limits(1):  # the problems are so small that threads only wait for each other
        losses = sum(_losses(x, y, *part) for part in _parts(x, y, seed))
        fitted = LogisticRegression(C=STRENGTHS[int(losses.argmin())], max_iter=2000).fit(x, y)  # type: ignore[union-attr]
    values = {"weight": fitted.coef_[0], "bias": fitted.intercept_[0], "strength": fitted.C}
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}


def _parts(x: Any, y: Any, seed: int) -> Iterator[tuple[Any, Any]]:
    """Which rows are fitted on, and which are held out."""
    from sklearn.model_selection import StratifiedKFold

    splits = min(SPLITS, int(y.sum()), int((1 - y).sum()))
    found: Iterator[tuple[Any, Any]] = StratifiedKFold(splits, shuffle=True, random_state=seed).split(x, y)
    return found


def _losses(x: Any, y: Any, fitted: Any, held_out: Any) -> Any:
    """The log-loss of held-out rows for each strength; a fit starts from the one before."""
    from sklearn.linear_model import LogisticRegression

    model, losses = LogisticRegression(max_iter=2000, warm_start=True), []
    for strength in STRENGTHS:
        margin = model.set_params(C=strength).fit(x[fitted], y[fitted]).decision_function(x[held_out])
        losses.append(np.logaddexp(0, np.where(y[held_out] == 1, -margin, margin)).sum())
    return np.array(losses)
