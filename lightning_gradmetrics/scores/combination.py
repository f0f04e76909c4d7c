"""A fitted combination of the logits' scores, the head's factors and every layer's gradient norms, from one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.statistics import accumulator
from lightning_gradmetrics.scores.classifiers import classified, column_scale, regularised_logistic, standardised
from lightning_gradmetrics.scores.detectors import (
    local_outlier_factor,
    lof_state,
    mahalanobis,
    mahalanobis_state,
    moment_sums,
)
from lightning_gradmetrics.scores.geometry import LOF_ROWS
from lightning_gradmetrics.scores.gradients import feature_norm, gradnorm, pseudo_label
from lightning_gradmetrics.scores.logits import energy, entropy, max_logit, max_softmax
from lightning_gradmetrics.scoring.evidence import Evidence, Target
from lightning_gradmetrics.scoring.features import feature_columns
from lightning_gradmetrics.scoring.fitted import Tensors, register_fitted

__all__ = ["COLUMNS", "NORMS", "OBJECTIVES", "combination"]

FLOOR = 1e-20
"""Added before a logarithm: below it a norm or a probability says nothing."""

CONSTANT = 1e-4
"""A feature whose standard deviation is not above it is a constant with rounding."""

NEIGHBOURS = 20


def _log(values: Tensor) -> Tensor:
    return (values.to(accumulator(values)) + FLOOR).log()


def _logit_margin(evidence: Evidence) -> Tensor:
    first, second = evidence.logits.topk(2, 1).values.unbind(1)
    return second - first


COLUMNS: dict[str, Callable[[Evidence], Tensor]] = {
    "log max_softmax": lambda e: _log(max_softmax.function(e)),
    "log entropy": lambda e: _log(entropy.function(e)),
    "logit margin": _logit_margin,
    "energy": energy.function,
    "max_logit": max_logit.function,
    "log |h|_1": lambda e: _log(-feature_norm.function(e, p=1)),
    "log |h|_2": lambda e: _log(-feature_norm.function(e, p=2)),
    "log |p - e_y|_2": lambda e: _log(pseudo_label.function(e, statistic="l2", factor="output")),
    "log |p - 1/C|_2": lambda e: _log(-gradnorm.function(e, p=2, factor="output")),
}
"""The features that need no backward pass: the scores of the logits, and the two factors of the head's gradients."""

OBJECTIVES = ("pseudo_label", "uniform")
NORMS = ("l1", "l2", "linf")


def _features(evidence: Evidence, target: Target) -> Tensor:
    """All features ``(N, F)``."""
    columns = torch.stack([column(evidence) for column in COLUMNS.values()], 1)
    if target == "head":
        return columns
    gradients = [evidence.gradient_per_parameter(objective, target) for objective in OBJECTIVES]
    layers = [_log(feature_columns(gradient, ("layer",), NORMS)) for gradient in gradients]
    return torch.cat([columns, *layers], 1)


DETECTORS = ("mahalanobis", "lof", "errors", "outside")
CLASSIFIERS = {
    "errors": ("errors", "right predictions", "labelled data that the model was not trained on, or more of it"),
    "outside": (
        "out-of-distribution samples",
        "in-distribution samples",
        "both kinds of data, with roles, as in datasets={'mine': 'id', 'other': 'far'}, or outside= without a Trainer",
    ),
}
"""The detectors that learn two classes: what their classes are called, and what to give where one is missing."""


@register_fitted("gradient", "this package; after Oberdiek et al. 2018, arXiv:1805.08440")
class combination:
    r"""A detector or a classifier of many scores and gradient norms together, standardised.

    ``detector`` says what it is fitted on and what it gives. On in-distribution samples alone, without labels:
    ``"mahalanobis"``, the Mahalanobis distance to their mean under a Ledoit-Wolf covariance; ``"lof"``, the local
    outlier factor with 20 neighbours. On in-distribution samples with labels that the model was not trained on:
    ``"errors"``, the probability of an error. On in- and out-of-distribution samples: ``"outside"``, the probability of
    being out-of-distribution. The classifiers are logistic regressions; an inner cross-validation chooses the penalty.

    The features, with ``z`` the logits, ``p`` their softmax, ``h`` the head's input and ``y`` the prediction:
    ``log(1 - p_y)``, ``log H(p)``, ``z_(2) - z_(1)``, ``-log sum_c exp(z_c)``, ``-max_c z_c``; the factors of the
    head's gradients ``log |h|_1``, ``log |h|_2``, ``log |p - e_y|_2``, ``log |p - 1/C|_2``; and for each layer of
    ``target`` the logarithms of the L1, L2 and largest absolute entry of its gradient, of the cross-entropy to the
    predicted class and to the uniform distribution. ``target="head"`` leaves the layers out and takes no backward pass.
    1e-20 is added before a logarithm. ``seed``: of the inner cross-validation.

    Whether it beats a single score is a question to the data: ``docs/combination.md``.
    """

    @staticmethod
    def measure(evidence: Evidence, *, detector: str = "mahalanobis", target: Target = "all", seed: int = 0) -> Tensors:
        """The features."""
        if detector not in DETECTORS:
            raise ValueError(f"unknown detector {detector!r} of combination; available: {', '.join(DETECTORS)}")
        return {"features": _features(evidence, target)}

    @staticmethod
    def accumulate(evidence: Evidence, measured: Tensors, *, detector: str = "mahalanobis", **_: Any) -> Tensors:
        """The features, and what a classifier learns; -1 where the label is not known."""
        rows = {"rows/features": measured["features"]}
        if detector == "errors":
            rows["rows/positive"] = evidence.wrong.long().masked_fill(evidence.labels < 0, -1)
        if detector == "outside":
            rows["rows/positive"] = evidence.outside.long()
        return rows

    @staticmethod
    def finish(total: Tensors, *, detector: str = "mahalanobis", seed: int = 0, **_: Any) -> Tensors:
        """Standardise, and fit the detector."""
        known = total["rows/features"].isfinite().all(1)
        if detector in CLASSIFIERS:
            known &= total["rows/positive"] >= 0
        features = total["rows/features"][known].double()
        if detector in CLASSIFIERS:
            _check_classes(detector, total["rows/positive"][known])
        elif len(features) < 2:
            raise ValueError(f"combination(detector={detector}) needs 2 or more samples, and there are {len(features)}")
        scale = column_scale(features, CONSTANT)
        features = standardised(features, scale)
        if detector == "mahalanobis":
            found = mahalanobis_state(moment_sums(features))
            return {**scale, "centre": found["mean"], "precision": found["precision"]}
        if detector == "lof":
            return {**scale, **lof_state(features[:LOF_ROWS], NEIGHBOURS)}
        return {**scale, **regularised_logistic(features, total["rows/positive"][known], seed)}

    @staticmethod
    def score(measured: Tensors, state: Tensors, *, detector: str = "mahalanobis", **_: Any) -> Tensor:
        """The distance, the outlier factor or the probability; NaN where a feature is not finite."""
        features = measured["features"].to(state["mean"].dtype)
        broken = features.isfinite().all(1).logical_not()
        if detector in CLASSIFIERS:
            found = classified(features, state)
        elif detector == "lof":
            found = local_outlier_factor(standardised(features, state), state, NEIGHBOURS)
        else:
            centred = {"mean": state["centre"], "precision": state["precision"]}
            found = mahalanobis(standardised(features, state), centred).clamp(min=0).sqrt()
        return found.masked_fill(broken, torch.nan)


def _check_classes(detector: str, positive: Tensor) -> None:
    """Refuse data that hold fewer than two samples of a class."""
    first, second, advice = CLASSIFIERS[detector]
    found = int(positive.sum()), int((1 - positive).sum())
    if min(found) < 2:
        raise ValueError(
            f"combination(detector={detector}) is fitted on 2 or more {first} and 2 or more {second}, and the data hold "
            f"{found[0]} and {found[1]}: give {advice}"
        )
