"""A fitted combination of logit scores, factors of the head's gradient and gradient norms of every layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

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
from lightning_gradmetrics.scoring.arguments import CountOrZero
from lightning_gradmetrics.scoring.evidence import Evidence, Target
from lightning_gradmetrics.scoring.features import feature_columns
from lightning_gradmetrics.scoring.fitted import FittedScore
from lightning_gradmetrics.scoring.registry import Score, register
from lightning_gradmetrics.scoring.totals import Tensors

__all__ = ["COLUMNS", "NORMS", "OBJECTIVES", "combination"]

FLOOR = 1e-20
"""Added before a logarithm; norms and probabilities below it carry no information."""

CONSTANT = 1e-4
"""A feature whose standard deviation is at most this is constant up to rounding."""

NEIGHBOURS = 20


def _log(values: Tensor) -> Tensor:
    return (values.to(accumulator(values)) + FLOOR).log()


def _logit_margin(evidence: Evidence) -> Tensor:
    first, second = evidence.logits.topk(2, 1).values.unbind(1)
    return second - first


def _log_of(score: Score, sign: float = 1.0) -> Callable[[Evidence], Tensor]:
    """Return the logarithm of a score, or of its negative."""
    return lambda evidence: _log(sign * score(evidence))


COLUMNS: dict[str, Callable[[Evidence], Tensor]] = {
    "log max_softmax": _log_of(max_softmax()),
    "log entropy": _log_of(entropy()),
    "logit margin": _logit_margin,
    "energy": energy(),
    "max_logit": max_logit(),
    "log |h|_1": _log_of(feature_norm(p=1.0), -1.0),
    "log |h|_2": _log_of(feature_norm(p=2.0), -1.0),
    "log |p - e_y|_2": _log_of(pseudo_label(statistic="l2", factor="output")),
    "log |p - 1/C|_2": _log_of(gradnorm(p=2.0, factor="output"), -1.0),
}
"""The features that need no backward pass: scores of the logits, and the two factors of the head's gradients."""

OBJECTIVES = ("pseudo_label", "uniform")
NORMS = ("l1", "l2", "linf")


def _features(evidence: Evidence, target: Target) -> Tensor:
    """Return all features ``(N, F)``."""
    columns = torch.stack([column(evidence) for column in COLUMNS.values()], 1)
    if target == "head":
        return columns
    gradients = [evidence.gradient_per_parameter(objective, target) for objective in OBJECTIVES]
    layers = [_log(feature_columns(gradient, ("layer",), NORMS)) for gradient in gradients]
    return torch.cat([columns, *layers], 1)


CLASSIFIERS = {
    "errors": ("errors", "correct predictions", "labelled data that the model was not trained on, or more of it"),
    "ood": (
        "out-of-distribution samples",
        "in-distribution samples",
        "both kinds of data, with roles, as in datasets={'mine': 'id', 'other': 'far'}, or ood= without a Trainer",
    ),
}
"""The detectors that learn two classes: the names of the classes, and the advice if one is missing."""


@register("gradient", "this package; after Oberdiek et al. 2018, arXiv:1805.08440")
class combination(FittedScore):
    r"""A detector or a classifier on many standardised scores and gradient norms together.

    The features, with ``z`` the logits, ``p`` their softmax, ``h`` the head's input and ``y`` the prediction:
    ``log(1 - p_y)``, ``log H(p)``, ``z_(2) - z_(1)``, ``-log sum_c exp(z_c)``, ``-max_c z_c``; the factors of the
    head's gradients ``log |h|_1``, ``log |h|_2``, ``log |p - e_y|_2``, ``log |p - 1/C|_2``; and for each layer of
    ``target`` the logarithms of the L1 norm, the L2 norm and the largest absolute entry of its gradient, for the
    cross-entropy to the predicted class and to the uniform distribution. 1e-20 is added before a logarithm.

    Whether it beats a single score depends on the data; see ``docs/combination.md``.

    Args:
        detector: ``"mahalanobis"`` and ``"lof"`` are fitted on in-distribution samples without labels: the Mahalanobis
            distance to their mean under a Ledoit-Wolf covariance, and the local outlier factor with 20 neighbours.
            ``"errors"`` is fitted on in-distribution samples with labels that the model was not trained on: the
            probability of an error. ``"ood"`` is fitted on in- and out-of-distribution samples: the probability of
            being out-of-distribution. These two are logistic regressions; an inner cross-validation chooses the penalty.
        target: The parameters: ``"all"``, a pattern such as ``"layer4.*"``, or a predicate on the name. ``"head"``
            leaves the layers out and takes no backward pass.
        seed: The seed of the inner cross-validation.

    Example:
        >>> import lightning_gradmetrics as lgm
        >>> _ = torch.manual_seed(0)
        >>> model, images = torch.nn.Linear(4, 3), torch.randn(40, 4)
        >>> (fitted,) = lgm.fit(model, [images], combination(detector="lof", target="head"))
        >>> lgm.score(model, images, fitted)["combination(detector=lof,target=head)"].shape
        torch.Size([40])

    Reference:
        P. Oberdiek, M. Rottmann and H. Gottschalk, "Classification Uncertainty of Deep Neural Networks Based on
        Gradient Information", ANNPR 2018, https://arxiv.org/abs/1805.08440
    """

    detector: Literal["mahalanobis", "lof", "errors", "ood"] = "mahalanobis"
    target: Target = "all"
    seed: CountOrZero = 0

    def measure(self, evidence: Evidence) -> Tensors:
        return {"features": _features(evidence, self.target)}

    def accumulate(self, evidence: Evidence, measured: Tensors) -> Tensors:
        rows = {"rows/features": measured["features"]}
        if self.detector == "errors":
            rows["rows/positive"] = evidence.incorrect.long().masked_fill(evidence.labels < 0, -1)
        if self.detector == "ood":
            rows["rows/positive"] = evidence.ood.long()
        return rows

    def finish(self, total: Tensors) -> Tensors:
        known = total["rows/features"].isfinite().all(1)
        if self.detector in CLASSIFIERS:
            known &= total["rows/positive"] >= 0
        features = total["rows/features"][known].double()
        if self.detector in CLASSIFIERS:
            _check_classes(self.detector, total["rows/positive"][known])
        elif len(features) < 2:
            raise ValueError(
                f"combination(detector={self.detector}) needs 2 or more samples, but there are {len(features)}"
            )
        scale = column_scale(features, CONSTANT)
        features = standardised(features, scale)
        if self.detector == "mahalanobis":
            normal = mahalanobis_state(moment_sums(features))
            return {**scale, "centre": normal["mean"], "precision": normal["precision"]}
        if self.detector == "lof":
            return {**scale, **lof_state(features[:LOF_ROWS], NEIGHBOURS)}
        return {**scale, **regularised_logistic(features, total["rows/positive"][known], self.seed)}

    def score(self, measured: Tensors, state: Tensors) -> Tensor:
        features = measured["features"].to(state["mean"].dtype)
        broken = features.isfinite().all(1).logical_not()
        if self.detector in CLASSIFIERS:
            values = classified(features, state)
        elif self.detector == "lof":
            values = local_outlier_factor(standardised(features, state), state, NEIGHBOURS)
        else:
            centred = {"mean": state["centre"], "precision": state["precision"]}
            values = mahalanobis(standardised(features, state), centred).clamp(min=0).sqrt()
        return values.masked_fill(broken, torch.nan)


def _check_classes(detector: str, positive: Tensor) -> None:
    """Refuse data with fewer than two samples of a class."""
    first, second, advice = CLASSIFIERS[detector]
    counts = int(positive.sum()), int((1 - positive).sum())
    if min(counts) < 2:
        raise ValueError(
            f"combination(detector={detector}) is fitted on 2 or more {first} and 2 or more {second}, but the data have "
            f"{counts[0]} and {counts[1]}: give {advice}"
        )
