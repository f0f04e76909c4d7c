"""Gradient norm scores, of the head in closed form or of any parameters by the engine."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.objectives import Objective
from lightning_gradmetrics.gradients.output_gradients import LogitGradient
from lightning_gradmetrics.gradients.statistics import GradientStatistics, axis_moments, moments_for, result_dtype
from lightning_gradmetrics.scoring.arguments import Allowed, Norm, Positive
from lightning_gradmetrics.scoring.evidence import Evidence, HeadGradient, Target
from lightning_gradmetrics.scoring.registry import register

__all__ = ["feature_norm", "gradnorm", "gradnorm_kl", "pseudo_label", "uniform"]


def _is_statistic(name: str) -> bool:
    """Return whether a string is the name of a statistic."""
    try:
        moments_for([name])
    except ValueError:
        return False
    return True


Statistic = Annotated[str, Allowed("max, min, mean, std, l1, l2, linf, or l<p> for a p-norm with p > 0", _is_statistic)]
Factor = Literal["both", "output"]


def _statistic(evidence: Evidence, objective: Objective, target: Target, factor: Factor, name: str) -> Tensor:
    """Return a statistic of a gradient; with ``factor="output"``, of the gradient of the logits alone."""
    gradient = evidence.gradient(objective, target)
    if factor == "both":
        return gradient.statistic(name)
    if not isinstance(gradient, HeadGradient):
        raise ValueError(f"factor='output' is for target='head', whose gradient has two factors; got target={target!r}")
    moments = axis_moments(gradient.output, moments_for([name]))
    count = torch.tensor(gradient.output.shape[1])
    return GradientStatistics(("output",), count, moments, result_dtype(gradient.output.dtype)).statistic(name)


@register("gradient", "Huang et al. 2021, arXiv:2110.00218")
def gradnorm(
    evidence: Evidence,
    *,
    temperature: Positive = 1.0,
    p: Norm = 1.0,
    target: Target = "head",
    factor: Factor = "both",
) -> Tensor:
    r"""Negative norm of the gradient of the cross-entropy to the uniform distribution.

    On the head's weight it is ``-|h|_1 |softmax(z / T) - 1/C|_1 / T`` with the logits ``z`` and the head's input ``h``:
    no backward pass. The official code returns ``C`` times the paper's norm.

    Args:
        temperature: The temperature ``T``.
        p: The p of the norm.
        target: The parameters: ``"head"``, ``"all"``, a pattern such as ``"layer4.*"``, or a predicate on the name.
        factor: ``"output"`` leaves out the feature norm ``|h|_p``, which is the score ``feature_norm``. If that score
            alone does as well, the gradient adds nothing.

    Returns:
        A score with values ``(N,)``, at most 0.

    Example:
        >>> evidence = Evidence(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), given_features=torch.ones(2, 3))
        >>> gradnorm(temperature=2.0)(evidence)
        tensor([-0.6932, -0.0000], dtype=torch.float64)

    Reference:
        R. Huang, A. Geng and Y. Li, "On the Importance of Gradients for Detecting Distributional Shifts in the Wild",
        NeurIPS 2021, https://arxiv.org/abs/2110.00218
    """
    return -_statistic(evidence, Objective.of("uniform", temperature=temperature), target, factor, f"l{p:g}")


@register("gradient", "Oberdiek et al. 2018, arXiv:1805.08440", alias_of="gradnorm")
def uniform(
    evidence: Evidence, *, statistic: Statistic = "l1", target: Target = "head", temperature: Positive = 1.0
) -> Tensor:
    r"""Negative statistic of the gradient of the cross-entropy to the uniform distribution: ``gradnorm`` for ``l1``.

    The gradient shrinks as the prediction gets less certain, so the score is the negative of the statistic; only
    ``min``, which rises, is not negated. ``pseudo_label`` uses the same statistics of another objective.

    Args:
        statistic: ``max``, ``min``, ``mean``, ``std``, ``l1``, ``l2``, ``linf`` or any ``l<p>``.
        target: The parameters: ``"head"``, ``"all"``, a pattern such as ``"layer4.*"``, or a predicate on the name.
        temperature: Divides the logits.

    Returns:
        A score with values ``(N,)``.

    Example:
        >>> evidence = Evidence(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), given_features=torch.ones(2, 3))
        >>> uniform(statistic="l2")(evidence)
        tensor([-0.9328, -0.0000], dtype=torch.float64)

    Reference:
        P. Oberdiek, M. Rottmann and H. Gottschalk, "Classification Uncertainty of Deep Neural Networks Based on
        Gradient Information", ANNPR 2018, https://arxiv.org/abs/1805.08440
    """
    value = evidence.gradient("uniform", target, temperature=temperature).statistic(statistic)
    return value if statistic == "min" else -value


@register("gradient", "Prabhushankar & AlRegib 2024, arXiv:2405.13758")
def gradnorm_kl(evidence: Evidence) -> Tensor:
    r"""Norm of the head gradient of the loss that GradTrust's demo calls "Grad Norm": not Huang et al.'s ``gradnorm``.

    ``|h|_2 |p (log p + H)|_2 / C`` with ``p`` the softmax, ``H`` its entropy and ``h`` the head's input. The demo calls
    ``torch.nn.KLDivLoss`` with the uniform distribution as the logarithms and the prediction as the target. The result
    is the gradient of the negative entropy over C, zero for certain and for uniform predictions. The demo prints the
    score's negative, as a confidence.

    Returns:
        A score with values ``(N,)``, at least 0.

    Example:
        >>> evidence = Evidence(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), given_features=torch.ones(2, 3))
        >>> gradnorm_kl()(evidence)
        tensor([0.2572, 0.0000], dtype=torch.float64)

    Reference:
        M. Prabhushankar and G. AlRegib, "Counterfactual Gradients-based Quantification of Prediction Trust in Neural
        Networks", 2024, https://arxiv.org/abs/2405.13758
    """
    softmax, classes = evidence.softmax(), evidence.logits_like.shape[1]
    gradient = LogitGradient(
        evidence.logits_like,
        lambda: softmax.entropy_gradient / classes,
        {2.0: lambda: softmax.squared_entropy_gradient / classes**2},
    )
    columns: Tensor | LogitGradient = gradient.tensor[:, 1:] if evidence.one_logit else gradient
    return HeadGradient(columns, evidence.head_input).norm(2)


@register("gradient", "Oberdiek et al. 2018, arXiv:1805.08440")
def pseudo_label(
    evidence: Evidence, *, statistic: Statistic = "l1", target: Target = "head", factor: Factor = "both"
) -> Tensor:
    r"""A statistic of the gradient of the cross-entropy to the predicted class.

    On the head's weight ``l1`` is ``|h|_1 |p - e_y|_1`` with the softmax ``p``, the prediction ``y`` and the head's
    input ``h``. ``min``, which falls as the gradient grows, is negated.

    Args:
        statistic: ``max``, ``min``, ``mean``, ``std``, ``l1``, ``l2``, ``linf`` or any ``l<p>``.
        target: The parameters: ``"head"``, ``"all"``, a pattern such as ``"layer4.*"``, or a predicate on the name.
        factor: ``"output"`` leaves out the feature norm ``|h|_p``.

    Returns:
        A score with values ``(N,)``.

    Example:
        >>> evidence = Evidence(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), given_features=torch.ones(2, 3))
        >>> pseudo_label()(evidence)
        tensor([0.7152, 3.0000], dtype=torch.float64)

    Reference:
        P. Oberdiek, M. Rottmann and H. Gottschalk, "Classification Uncertainty of Deep Neural Networks Based on
        Gradient Information", ANNPR 2018, https://arxiv.org/abs/1805.08440
    """
    value = _statistic(evidence, Objective.of("pseudo_label"), target, factor, statistic)
    return -value if statistic == "min" else value


@register("gradient", "Huang et al. 2021, arXiv:2110.00218")
def feature_norm(evidence: Evidence, *, p: Norm = 1.0) -> Tensor:
    r"""Negative norm of the head's input, ``-|h|_p``, a factor of every gradient of the head.

    The other factor is ``gradnorm(factor="output")``.

    Args:
        p: The p of the norm.

    Returns:
        A score with values ``(N,)``, at most 0.

    Example:
        >>> evidence = Evidence(torch.zeros(2, 2), given_features=torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        >>> feature_norm(p=2)(evidence)
        tensor([-5., -1.], dtype=torch.float64)

    Reference:
        R. Huang, A. Geng and Y. Li, "On the Importance of Gradients for Detecting Distributional Shifts in the Wild",
        NeurIPS 2021, https://arxiv.org/abs/2110.00218
    """
    return -evidence.layer_input.norm(p)
