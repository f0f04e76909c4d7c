"""Gradient scores: of the head in closed form, or of any parameters by the engine, from the same few lines."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.objectives import Objective, log_probabilities
from lightning_gradmetrics.gradients.statistics import GradientStatistics
from lightning_gradmetrics.scoring.evidence import Evidence, HeadGradient, Target
from lightning_gradmetrics.scoring.registry import register

__all__ = ["feature_norm", "gradnorm", "gradnorm_kl", "pseudo_label"]


FACTORS = ("both", "output")


def _statistic(evidence: Evidence, objective: Objective, target: Target, factor: str, name: str) -> Tensor:
    """A statistic of a gradient; with ``factor="output"``, of the gradient of the logits alone."""
    if factor not in FACTORS:
        raise ValueError(
            f"unknown factor {factor!r}; available: {', '.join(FACTORS)}, and the score feature_norm for the other factor"
        )
    gradient = evidence.gradient(objective, target)
    if factor == "both":
        return gradient.statistic(name)
    if not isinstance(gradient, HeadGradient):
        raise ValueError(f"factor='output' is for target='head', whose gradient has two factors; got target={target!r}")
    return GradientStatistics.of({"output": gradient.output}, [name]).statistic(name)


@register("gradient", "Huang et al. 2021, arXiv:2110.00218")
def gradnorm(
    evidence: Evidence, *, temperature: float = 1.0, p: float = 1.0, target: Target = "head", factor: str = "both"
) -> Tensor:
    r"""Negative norm of the gradient of the cross-entropy to the uniform distribution.

    On the head ``-|h|_1 |softmax(z / T) - 1/C|_1 / T``: the paper's quantity is its negative, and the official code's
    is ``C`` times that. ``target="all"`` takes the norm over all parameters. ``factor="output"`` leaves out the feature
    norm ``|h|_1``, which is the score ``feature_norm``: where that one alone does as well, the gradient adds nothing.
    """
    return -_statistic(evidence, Objective.of("uniform", temperature=temperature), target, factor, f"l{p:g}")


@register("gradient", "Prabhushankar & AlRegib 2024, arXiv:2405.13758")
def gradnorm_kl(evidence: Evidence) -> Tensor:
    r"""Norm of the head gradient of the loss that GradTrust's demo calls "Grad Norm": not Huang et al.'s ``gradnorm``.

    ``|h|_2 |p (log p + H)|_2 / C`` with ``p`` the softmax and ``H`` its entropy: the demo hands the uniform
    distribution as the logarithms, and the prediction as the target, to ``torch.nn.KLDivLoss``. The gradient is that of
    the negative entropy over C, zero for certain and for uniform predictions. The demo prints the score's negative, as
    a confidence.
    """
    log_p = log_probabilities(evidence.logits)
    p = log_p.exp()
    output = p * (log_p - (p * log_p).sum(1, keepdim=True)) / p.shape[1]
    return _norm(evidence.features, 2) * _norm(output, 2)


@register("gradient", "Oberdiek et al. 2018, arXiv:1805.08440")
def pseudo_label(evidence: Evidence, *, statistic: str = "l1", target: Target = "head", factor: str = "both") -> Tensor:
    r"""A statistic of the gradient of the cross-entropy to the predicted class.

    ``statistic``: ``max``, ``min``, ``mean``, ``std``, ``l1``, ``l2``, ``linf`` or any ``l<p>``. Of ``min``, which
    falls as the gradient grows, the score is the negative. On the head ``l1`` is ``|h|_1 |p - e_y|_1``; ``factor="output"`` leaves
    out the feature norm.
    """
    value = _statistic(evidence, Objective.of("pseudo_label"), target, factor, statistic)
    return -value if statistic == "min" else value


@register("gradient", "Huang et al. 2021, arXiv:2110.00218")
def feature_norm(evidence: Evidence, *, p: float = 1.0) -> Tensor:
    r"""Negative norm of the head's input, ``-|h|_p``: the factor that every head score has, by itself.

    The other factor is that of ``gradnorm(factor="output")``.
    """
    return -_norm(evidence.features, p)


def _norm(rows: Tensor, p: float) -> Tensor:
    """The p-norm of each row, ``(N, D) -> (N,)``."""
    norm: Tensor = torch.linalg.vector_norm(rows, p, 1)
    return norm
