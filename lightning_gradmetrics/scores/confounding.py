"""Gradients towards a confounding label of ones (Lee & AlRegib): two norms and the trained detector."""

from __future__ import annotations

import logging
import math
from typing import Literal

from torch import Tensor

from lightning_gradmetrics.scores.classifiers import (
    classified,
    column_scale,
    cross_validated_auroc,
    standardised,
    two_layers,
)
from lightning_gradmetrics.scoring.arguments import Count, CountOrZero
from lightning_gradmetrics.scoring.evidence import Evidence, Target
from lightning_gradmetrics.scoring.fitted import FittedScore
from lightning_gradmetrics.scoring.registry import register
from lightning_gradmetrics.scoring.totals import Tensors

__all__ = ["confounding", "confounding_detector", "purview"]

FLOOR = 1e-12
"""Added before a logarithm; squared norms below it carry no information."""


def _objective(logits: bool) -> str:
    return "confounding_logits" if logits else "confounding"


@register("gradient", "Lee & AlRegib 2020, arXiv:2008.08030")
def confounding(evidence: Evidence, *, logits: bool = False, target: Target = "all") -> Tensor:
    r"""Sum over the parameters of the squared L2 norm of the gradient towards a label of ones.

    The loss is the binary cross-entropy of the softmax to ones, ``-sum_c log p_c``. On the head's weight the score is
    ``C^2 |h|_2^2 |p - 1/C|_2^2``; with ``logits=True`` it is ``|h|_2^2 sum_c sigmoid(-z_c)^2``.

    The direction is disputed. Here a large gradient counts as uncertain, as in pytorch-ood before version 0.4; later
    versions use the negative. With the softmax, the gradient is small for an undecided prediction. The paper trains a
    detector on the norms, which learns the direction: ``confounding_detector``.

    Args:
        logits: Whether to use the paper's binary cross-entropy with logits, ``-sum_c log sigmoid(z_c)``.
        target: The parameters: ``"head"``, ``"all"``, a pattern such as ``"layer4.*"``, or a predicate on the name.

    Returns:
        A score with values ``(N,)``, at least 0.

    Example:
        >>> import torch
        >>> evidence = Evidence(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), given_features=torch.ones(2, 3))
        >>> confounding(target="head", logits=True)(evidence)
        tensor([0.7926, 1.5000], dtype=torch.float64)

    Reference:
        J. Lee and G. AlRegib, "Gradients as a Measure of Uncertainty in Neural Networks", ICIP 2020,
        https://arxiv.org/abs/2008.08030
    """
    return evidence.gradient(_objective(logits), target).norm(2).square()


@register("gradient", "Lee et al. 2023, arXiv:2304.02834")
def purview(evidence: Evidence, *, part: Literal["initial", "final"] = "initial") -> Tensor:
    r"""Mean squared L2 norm of the gradients towards a label of ones, over the first or last half of the parameters.

    The loss is the binary cross-entropy with logits, averaged over the classes. GradTrust's demo prints the negative, as
    a confidence. That demo also adds the previous score's gradient, because it does not reset it; this score does not.

    Args:
        part: Which half. With an even number of parameters the last one of the first half belongs to neither, as in
            GradTrust's demo.

    Returns:
        A score with values ``(N,)``, at least 0.

    Example:
        >>> import torch, lightning_gradmetrics as lgm
        >>> model, images = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 3)), torch.zeros(2, 2)
        >>> lgm.score(model, images, purview(part="final"))["purview(part=final)"].shape
        torch.Size([2])

    Reference:
        J. Lee, C. Lehman, M. Prabhushankar and G. AlRegib, "Probing the Purview of Neural Networks via Gradient
        Analysis", IEEE Access 2023, https://arxiv.org/abs/2304.02834
    """
    norms = evidence.gradient_per_parameter("confounding_logits", "all").norm(2)
    squares = (norms / evidence.logits.shape[1]).square()
    count = squares.shape[1]
    half = squares[:, : max(1, (count - 1) // 2)] if part == "initial" else squares[:, count // 2 :]
    return half.mean(1)


@register("gradient", "Lee & AlRegib 2020, arXiv:2008.08030")
class confounding_detector(FittedScore):
    r"""Probability of being out-of-distribution, by a detector trained on each parameter's squared gradient norm.

    The gradients are those of ``confounding``. The features are the logarithms of the squared L2 norms, one per
    parameter, standardised. The detector has two fully connected layers and is trained on in- and out-of-distribution
    samples.

    Args:
        logits: Whether to use the paper's binary cross-entropy with logits instead of the one of the softmax.
        target: The parameters: ``"head"``, ``"all"``, a pattern such as ``"layer4.*"``, or a predicate on the name.
        hidden: The width of the hidden layer.
        epochs: Passes over the samples.
        folds: If 2 or more, the detector is also cross-validated with this number of folds, and the AUROC of each fold
            is stored in the state as ``cross_validated_auroc``. 0 skips this.
        seed: The seed of the weights and the folds.

    Example:
        >>> import torch, lightning_gradmetrics as lgm
        >>> _ = torch.manual_seed(0)
        >>> model, images = torch.nn.Linear(4, 3), torch.randn(20, 4)
        >>> (fitted,) = lgm.fit(model, [images], confounding_detector(epochs=2), ood=[5 + images])
        >>> lgm.score(model, images, fitted)["confounding_detector(epochs=2)"].shape
        torch.Size([20])

    Reference:
        J. Lee and G. AlRegib, "Gradients as a Measure of Uncertainty in Neural Networks", ICIP 2020,
        https://arxiv.org/abs/2008.08030
    """

    logits: bool = True
    target: Target = "all"
    hidden: Count = 32
    epochs: Count = 30
    folds: CountOrZero = 0
    seed: CountOrZero = 0

    def measure(self, evidence: Evidence) -> Tensors:
        gradients = evidence.gradient_per_parameter(_objective(self.logits), self.target)
        return {"features": (gradients.norm(2).double().square() + FLOOR).log()}

    def accumulate(self, evidence: Evidence, measured: Tensors) -> Tensors:
        return {"rows/features": measured["features"], "rows/ood": evidence.ood}

    def finish(self, total: Tensors) -> Tensors:
        known = total["rows/features"].isfinite().all(1)
        features, ood = total["rows/features"][known], total["rows/ood"][known].long()
        _check_both(int(ood.sum()), len(ood))
        scale = column_scale(features)
        features = standardised(features, scale)
        state = {**scale, **self._trained(features, ood)}
        if self.folds:
            areas = cross_validated_auroc(features, ood, self.folds, self._trained, self.seed)
            state["cross_validated_auroc"] = areas
            logging.getLogger(__name__).info(
                "confounding_detector: AUROC %.4f, the mean of %d folds", areas.mean(), self.folds
            )
        return state

    def _trained(self, features: Tensor, ood: Tensor) -> Tensors:
        """Return the detector's two layers; the batch grows with the data, to at most 20 steps per epoch."""
        batch_size = max(32, math.ceil(len(features) / 20))
        return two_layers(
            features,
            ood,
            hidden=self.hidden,
            epochs=self.epochs,
            penalty=1e-4,
            learning_rate=1e-2,
            batch_size=batch_size,
            seed=self.seed,
        )

    def score(self, measured: Tensors, state: Tensors) -> Tensor:
        return classified(measured["features"], state)


def _check_both(ood: int, count: int) -> None:
    """Refuse data without both kinds of samples."""
    if ood in (0, count):
        missing = "out-of-distribution" if not ood else "in-distribution"
        raise ValueError(
            f"the {count} samples to fit 'confounding_detector' on include no {missing} sample: it is trained on both "
            "kinds. Give fit() dataloaders with roles, as in datasets={'mine': 'id', 'other': 'far'}, or ood= without a "
            "Trainer"
        )
