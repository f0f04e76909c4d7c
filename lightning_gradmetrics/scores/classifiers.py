"""Classifiers of standardised features as tensors: what the fitted scores that learn two classes share."""

from __future__ import annotations

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
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from threadpoolctl import threadpool_limits

    splits = min(SPLITS, int(target.sum()), int((1 - target).sum()))
    parts = StratifiedKFold(splits, shuffle=True, random_state=seed)
    search = GridSearchCV(LogisticRegression(max_iter=2000), {"C": STRENGTHS}, scoring="neg_log_loss", cv=parts)
    with threadpool_limits(1):  # the problems are so small that threads only wait for each other
        fitted = search.fit(features.numpy(), target.numpy()).best_estimator_
    values = {"weight": fitted.coef_[0], "bias": fitted.intercept_[0], "strength": fitted.C}
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}
