"""Classifiers of standardised features, stored as tensors, for fitted scores that learn two classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "classified",
    "column_scale",
    "cross_validated_auroc",
    "logistic",
    "regularised_logistic",
    "standardised",
    "two_layers",
]

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""The values of scikit-learn's ``C`` (one over the penalty's weight) that the inner cross-validation tries."""

SPLITS = 5
"""Number of folds of the inner cross-validation; fewer if the smaller class has fewer samples."""


def column_scale(features: Tensor, least: float = 0.0) -> dict[str, Tensor]:
    """Return mean and standard deviation of each column, ``mean`` and ``scale`` ``(F,)``.

    Args:
        features: ``(M, F)``.
        least: A standard deviation up to this value counts as rounding; the column's scale is then 1.
    """
    scale = features.std(0, correction=0)
    return {"mean": features.mean(0), "scale": torch.where(scale > least, scale, 1.0)}


def standardised(features: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Return the features ``(N, F)`` minus the state's ``mean``, divided by its ``scale``."""
    scaled: Tensor = (features.to(state["mean"].dtype) - state["mean"]) / state["scale"]
    return scaled


def classified(features: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Return the probability of the second class, ``(N,)``: logistic, after a hidden layer if the state has one.

    Args:
        features: ``(N, F)``.
        state: ``mean``, ``scale``, ``weight`` and ``bias``; optionally ``weight1`` ``(F, H)`` and ``bias1``.
    """
    hidden = standardised(features, state)
    if "weight1" in state:
        hidden = torch.relu(hidden @ state["weight1"] + state["bias1"])
    return torch.sigmoid(hidden @ state["weight"] + state["bias"])


def logistic(features: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Fit scikit-learn's logistic regression with its default penalty.

    Args:
        features: ``(M, F)``, standardised.
        target: ``(M,)``, 0 or 1.

    Returns:
        ``weight`` ``(F,)`` and ``bias``.
    """
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(max_iter=2000, tol=1e-8).fit(features.numpy(), target.numpy())
    return _tensors(weight=fitted.coef_[0], bias=fitted.intercept_[0])


def two_layers(
    features: Tensor,
    target: Tensor,
    *,
    hidden: int = 32,
    epochs: int = 300,
    penalty: float = 1e-2,
    learning_rate: float = 1e-3,
    batch_size: int = 200,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Fit a classifier of two fully connected layers, scikit-learn's ``MLPClassifier``.

    Args:
        features: ``(M, F)``, standardised.
        target: ``(M,)``, 0 or 1.
        hidden: The width H of the hidden layer.
        epochs: The largest number of passes over the samples; training stops when the loss no longer falls.
        penalty: The weight of the L2 penalty.
        learning_rate: Adam's learning rate.
        batch_size: Samples in a batch.
        seed: The seed of the weights and of the order of the samples.

    Returns:
        ``weight1`` ``(F, H)``, ``bias1``, ``weight`` ``(H,)`` and ``bias``.

    Example:
        >>> x = torch.linspace(-2, 2, 40, dtype=torch.float64)[:, None]
        >>> two_layers(x, (x[:, 0].abs() > 1).long(), hidden=8, epochs=2)["weight1"].shape
        torch.Size([1, 8])
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    network = MLPClassifier(
        (hidden,),
        alpha=penalty,
        batch_size=min(batch_size, len(features)),
        learning_rate_init=learning_rate,
        max_iter=epochs,
        random_state=seed,
    )
    with warnings.catch_warnings(), threadpool_limits(1):  # more threads would be slower
        warnings.simplefilter("ignore", ConvergenceWarning)  # stopping early is intended
        network.fit(features.numpy(), target.numpy())
    (weight1, weight), (bias1, bias) = network.coefs_, network.intercepts_
    return _tensors(weight1=weight1, bias1=bias1, weight=weight[:, 0], bias=bias[0])


def _tensors(**arrays: Any) -> dict[str, Tensor]:
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in arrays.items()}


def cross_validated_auroc(
    features: Tensor, target: Tensor, folds: int, fit: Callable[[Tensor, Tensor], dict[str, Tensor]], seed: int = 0
) -> Tensor:
    """Return the AUROC on each fold of a classifier fitted on the others, ``(folds,)``.

    Args:
        features: ``(M, F)``, standardised.
        target: ``(M,)``, 0 or 1.
        folds: The number of folds.
        fit: A function from features and target to the classifier's tensors.
        seed: The seed of the folds.

    Raises:
        ValueError: If a class has fewer samples than there are folds.
    """
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold

    smallest = int(min(target.sum(), (1 - target.long()).sum()))
    if not 2 <= folds <= smallest:
        raise ValueError(
            f"folds is {folds}; it must be between 2 and {smallest}, the number of samples of the smaller class"
        )
    identity = {"mean": features.new_zeros(()), "scale": features.new_ones(())}
    areas = []
    for inside, outside in StratifiedKFold(folds, shuffle=True, random_state=seed).split(features, target):
        state = {**identity, **fit(features[inside], target[inside])}
        areas.append(float(roc_auc_score(target[outside], classified(features[outside], state))))
    return torch.tensor(areas, dtype=torch.float64)


def regularised_logistic(features: Tensor, target: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Fit a logistic regression with an L2 penalty chosen by stratified cross-validation of the log-loss.

    Args:
        features: ``(M, F)``, standardised.
        target: ``(M,)``, 0 or 1, with two or more samples of each.
        seed: The seed of the cross-validation.

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
    with threadpool_limits(1):  # the problems are so small that more threads would be slower
        losses = sum(_losses(x, y, *rows) for rows in _parts(x, y, seed))
        fitted = LogisticRegression(C=STRENGTHS[int(losses.argmin())], max_iter=2000).fit(x, y)  # type: ignore[union-attr]
    return _tensors(weight=fitted.coef_[0], bias=fitted.intercept_[0], strength=fitted.C)


def _parts(x: Any, y: Any, seed: int) -> Iterator[tuple[Any, Any]]:
    """Yield the rows to fit on and the held-out rows of each part."""
    from sklearn.model_selection import StratifiedKFold

    splits = min(SPLITS, int(y.sum()), int((1 - y).sum()))
    parts: Iterator[tuple[Any, Any]] = StratifiedKFold(splits, shuffle=True, random_state=seed).split(x, y)
    return parts


def _losses(x: Any, y: Any, fitted: Any, held_out: Any) -> Any:
    """Return the log-loss of held-out rows for each strength; each fit starts from the previous one."""
    from sklearn.linear_model import LogisticRegression

    model, losses = LogisticRegression(max_iter=2000, warm_start=True), []
    for strength in STRENGTHS:
        margin = model.set_params(C=strength).fit(x[fitted], y[fitted]).decision_function(x[held_out])
        losses.append(np.logaddexp(0, np.where(y[held_out] == 1, -margin, margin)).sum())
    return np.array(losses)
