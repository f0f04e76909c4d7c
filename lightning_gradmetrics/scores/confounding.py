"""Gradients against a confounding label of ones (Lee & AlRegib): the sum, the halves, and the trained detector."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from lightning_gradmetrics.scores.classifiers import classified, column_scale, standardised
from lightning_gradmetrics.scoring.evidence import Evidence, Target
from lightning_gradmetrics.scoring.fitted import Tensors, register_fitted
from lightning_gradmetrics.scoring.registry import register

__all__ = ["confounding", "confounding_detector", "purview"]

PARTS = ("initial", "final")
FLOOR = 1e-12
"""Below it a squared norm is as good as zero, and its logarithm says nothing."""


def _objective(logits: bool) -> str:
    return "confounding_logits" if logits else "confounding"


@register("gradient", "Lee & AlRegib 2020, arXiv:2008.08030")
def confounding(evidence: Evidence, *, logits: bool = False, target: Target = "all") -> Tensor:
    r"""Sum over the parameters of the squared L2 norm of the gradient towards a label of ones.

    The loss is the binary cross-entropy of the softmax to ones, ``-sum_c log p_c``; ``logits=True`` takes the paper's,
    with logits, ``-sum_c log sigmoid(z_c)``. On the head's weight they are ``C^2 |h|_2^2 |p - 1/C|_2^2`` and ``|h|_2^2
    sum_c sigmoid(-z_c)^2``.

    The direction is disputed: a large gradient counts as uncertain here, as in pytorch-ood before 0.4, which has taken
    the negative since: with the softmax the gradient is small for an undecided prediction. The paper trains a detector
    on the norms, which learns the direction: ``confounding_detector``.
    """
    return evidence.gradient(_objective(logits), target).norm(2).square()


@register("gradient", "Lee et al. 2023, arXiv:2304.02834")
def purview(evidence: Evidence, *, part: str = "initial") -> Tensor:
    r"""Mean squared L2 norm of the gradients towards a label of ones, over the first or last half of the parameters.

    The loss is the binary cross-entropy with logits, averaged over the classes. ``part``: ``"initial"`` or ``"final"``;
    with an even number of parameters the last one of the first half belongs to neither, as in GradTrust's demo, whose
    quantity, a confidence, is the negative. That demo also adds the gradient of the score before it, for lack of a
    reset; this one does not.
    """
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r}; available: {', '.join(PARTS)}")
    squares = (evidence.gradient_per_parameter("confounding_logits", "all").norm(2) / evidence.logits.shape[1]).square()
    count = squares.shape[1]
    half = squares[:, : max(1, (count - 1) // 2)] if part == "initial" else squares[:, count // 2 :]
    return half.mean(1)


@register_fitted("gradient", "Lee & AlRegib 2020, arXiv:2008.08030")
class confounding_detector:
    r"""Probability of being out-of-distribution, by a detector trained on each parameter's squared gradient norm.

    The gradients are those of ``confounding``; the features are the logarithms of the squared L2 norms, one a
    parameter, standardised. The detector has two fully connected layers and is trained on in- and out-of-distribution
    samples.

    ``logits``: the paper's binary cross-entropy with logits, or with the softmax. ``target``: the parameters.
    ``hidden``: width of the hidden layer. ``epochs``: passes over the samples. ``folds``: with two or more, the
    detector is also trained and judged on as many parts of the samples; the AUROC of each is in the state, as
    ``cross_validated_auroc``. ``seed``: of the weights and the folds.
    """

    @staticmethod
    def measure(
        evidence: Evidence,
        *,
        logits: bool = True,
        target: Target = "all",
        hidden: int = 32,
        epochs: int = 30,
        folds: int = 0,
        seed: int = 0,
    ) -> Tensors:
        """The logarithms of the squared norms ``(N, P)``."""
        squares = evidence.gradient_per_parameter(_objective(logits), target).norm(2).double().square()
        return {"features": (squares + FLOOR).log()}

    @staticmethod
    def accumulate(evidence: Evidence, measured: Tensors, **_: Any) -> Tensors:
        """The features, and which samples are out-of-distribution."""
        return {"rows/features": measured["features"], "rows/outside": evidence.outside}

    @staticmethod
    def finish(
        total: Tensors, *, hidden: int = 32, epochs: int = 30, folds: int = 0, seed: int = 0, **_: Any
    ) -> Tensors:
        """Train the detector."""
        from lightning_gradmetrics.scores.confounding_network import cross_validated_auroc, train_detector

        known = total["rows/features"].isfinite().all(1)
        features, outside = total["rows/features"][known], total["rows/outside"][known]
        _check_both(int(outside.sum()), len(outside))
        scale = column_scale(features)
        features = standardised(features, scale)
        trained = train_detector(features, outside, hidden, epochs, seed).network.state_dict()
        state = {"weight1": trained["0.weight"].T, "bias1": trained["0.bias"]}
        state |= {"weight": trained["2.weight"][0], "bias": trained["2.bias"][0]}
        if folds:
            state["cross_validated_auroc"] = cross_validated_auroc(features, outside, folds, hidden, epochs, seed)
            logging.getLogger(__name__).info(
                "confounding_detector: AUROC %.4f, the mean of %d folds", state["cross_validated_auroc"].mean(), folds
            )
        return {**scale, **state}

    @staticmethod
    def score(measured: Tensors, state: Tensors, **_: Any) -> Tensor:
        """Apply it: the probability of being out-of-distribution."""
        return classified(measured["features"], state)


def _check_both(outside: int, count: int) -> None:
    if outside in (0, count):
        missing = "out-of-distribution" if not outside else "in-distribution"
        raise ValueError(
            f"the {count} samples to fit 'confounding_detector' on hold no {missing} sample: it is trained on both "
            "kinds. Give fit() dataloaders with roles, as in datasets={'mine': 'id', 'other': 'far'}, or outside= without a Trainer"
        )
