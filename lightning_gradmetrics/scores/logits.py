"""Scores of the logits only: the baselines, and GradTrust, whose gradient is a function of the logits."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.blocks import by_blocks
from lightning_gradmetrics.scoring.arguments import Allowed, Positive
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.registry import register

__all__ = ["doctor", "energy", "entropy", "gradtrust", "log_likelihood", "margin", "max_logit", "max_softmax"]


@register("baseline", "Hendrycks & Gimpel 2017, arXiv:1610.02136")
def max_softmax(evidence: Evidence, *, temperature: Positive = 1.0) -> Tensor:
    r"""One minus the largest softmax probability, ``1 - max_c p_c``.

    It is computed as the sum of all other probabilities, which stays accurate for confident samples.

    Args:
        temperature: Divides the logits.

    Returns:
        A score with values ``(N,)`` in ``[0, 1 - 1/C]``.

    Example:
        >>> evidence = Evidence(torch.tensor([[2.0, 0.0], [0.1, 0.0]]))
        >>> max_softmax()(evidence)
        tensor([0.1192, 0.4750], dtype=torch.float64)

    Reference:
        D. Hendrycks and K. Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
        Networks", ICLR 2017, https://arxiv.org/abs/1610.02136
    """
    return evidence.softmax(temperature).error


@register("baseline", "Shannon 1948")
def entropy(evidence: Evidence, *, temperature: Positive = 1.0) -> Tensor:
    r"""Entropy of the softmax in nats, ``-sum_c p_c log p_c``.

    Args:
        temperature: Divides the logits.

    Returns:
        A score with values ``(N,)`` in ``[0, log C]``.

    Example:
        >>> evidence = Evidence(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
        >>> entropy()(evidence)
        tensor([0.3653, 0.6931], dtype=torch.float64)

    Reference:
        C. Shannon, "A Mathematical Theory of Communication", Bell System Technical Journal 27, 1948,
        https://doi.org/10.1002/j.1538-7305.1948.tb01338.x
    """
    return evidence.softmax(temperature).entropy


@register("baseline", "Scheffer et al. 2001")
def margin(evidence: Evidence, *, temperature: Positive = 1.0) -> Tensor:
    r"""Negative margin between the two largest softmax probabilities, ``p_(2) - p_(1)``.

    Args:
        temperature: Divides the logits.

    Returns:
        A score with values ``(N,)`` in ``[-1, 0]``.

    Example:
        >>> evidence = Evidence(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
        >>> margin()(evidence)
        tensor([-0.7616,  0.0000], dtype=torch.float64)

    Reference:
        T. Scheffer, C. Decomain and S. Wrobel, "Active Hidden Markov Models for Information Extraction", IDA 2001,
        https://doi.org/10.1007/3-540-44816-0_31
    """
    softmax = evidence.softmax(temperature)
    return softmax.second - (1 - softmax.error)


@register("baseline", "Liu et al. 2020, arXiv:2010.03759")
def energy(evidence: Evidence, *, temperature: Positive = 1.0) -> Tensor:
    r"""Free energy of the logits, ``-T log sum_c exp(z_c / T)``.

    Args:
        temperature: The temperature ``T``.

    Returns:
        A score with values ``(N,)``, unbounded.

    Example:
        >>> evidence = Evidence(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
        >>> energy()(evidence)
        tensor([-2.1269, -0.6931], dtype=torch.float64)

    Reference:
        W. Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020, https://arxiv.org/abs/2010.03759
    """
    return -temperature * evidence.softmax(temperature).log_partition


@register("baseline", "Hendrycks et al. 2022, arXiv:1911.11132")
def max_logit(evidence: Evidence) -> Tensor:
    r"""Negative largest logit, ``-max_c z_c``.

    Returns:
        A score with values ``(N,)``, unbounded.

    Example:
        >>> evidence = Evidence(torch.tensor([[2.0, 0.0], [0.0, -1.0]]))
        >>> max_logit()(evidence)
        tensor([-2., -0.], dtype=torch.float64)

    Reference:
        D. Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings", ICML 2022,
        https://arxiv.org/abs/1911.11132
    """
    return -evidence.logits.amax(1)


@register("baseline", "Prabhushankar & AlRegib 2024, arXiv:2405.13758", alias_of="max_logit")
def log_likelihood(evidence: Evidence) -> Tensor:
    r"""Negative largest logit: ``max_logit`` under the name that GradTrust's demo gives it.

    Returns:
        A score with values ``(N,)``, unbounded.

    Example:
        >>> evidence = Evidence(torch.tensor([[2.0, 0.0], [0.0, -1.0]]))
        >>> log_likelihood()(evidence)
        tensor([-2., -0.], dtype=torch.float64)

    Reference:
        M. Prabhushankar and G. AlRegib, "Counterfactual Gradients-based Quantification of Prediction Trust in Neural
        Networks", 2024, https://arxiv.org/abs/2405.13758
    """
    return -evidence.logits.amax(1)


AtLeastTwo = Annotated[int, Allowed("a whole number of at least 2", lambda value: value >= 2)]


@register("gradient", "Prabhushankar & AlRegib 2024, arXiv:2405.13758")
def gradtrust(evidence: Evidence, *, k: AtLeastTwo | None = None) -> Tensor:
    r"""Negative GradTrust: the largest over the mean variance of the squared head gradient's rows.

    The gradient of the squared error between the logits and ``1/C`` with respect to the head's weight is ``2/C a h^T``
    with ``a = z - 1/C``. The features ``h`` cancel in the ratio: ``trust = C (|a|_inf / |a|_4)^4``. No gradient is
    computed, and no power overflows. The trust changes if a constant is added to the logits.

    Args:
        k: Use only the k classes with the largest logits as counterfactual classes; the trust is then in ``[1, k]``.
            ``None`` uses all C classes, as the paper's demo does.

    Returns:
        A score with values ``(N,)`` in ``[-C, -1]``.

    Example:
        >>> evidence = Evidence(torch.tensor([[2.5, 0.5], [0.0, 1.0]]))
        >>> gradtrust()(evidence)
        tensor([-2., -1.], dtype=torch.float64)

    Reference:
        M. Prabhushankar and G. AlRegib, "Counterfactual Gradients-based Quantification of Prediction Trust in Neural
        Networks", 2024, https://arxiv.org/abs/2405.13758
    """
    logits, mean = evidence.given_logits.detach(), 1 / evidence.given_logits.shape[1]
    if k is not None and k < logits.shape[1]:
        logits = logits.topk(k, 1).values
    if evidence.dtype == torch.float64 and logits.dtype != torch.float64:
        return _negative_trust_of_narrow(logits, mean)
    return by_blocks(lambda block: _negative_trust(block, mean, evidence.dtype), logits)


def _negative_trust_of_narrow(logits: Tensor, mean: float) -> Tensor:
    """Return the score of logits in float32 or half precision, whose fourth powers float64 holds without a scale."""
    largest = torch.maximum(logits.amax(1).double() - mean, mean - logits.amin(1).double())
    fourth_powers = by_blocks(lambda block: _fourth_powers(block.double().sub_(mean)), logits)
    return torch.where(largest == 0, -1.0, -logits.shape[1] * largest.pow(4) / fourth_powers)


def _fourth_powers(a: Tensor) -> Tensor:
    squares = a.square_()  # in place, because allocating memory takes longer than the arithmetic
    total: Tensor = torch.linalg.vecdot(squares, squares, dim=1)
    return total


def _negative_trust(logits: Tensor, mean: float, dtype: torch.dtype) -> Tensor:
    a = logits.to(dtype, copy=True).sub_(mean)
    # Division by the largest entry keeps the fourth power in range; an all-zero sample has equal rows, so its trust is
    # 1. In place again.
    largest = torch.maximum(a.amax(1), -a.amin(1))
    return torch.where(largest == 0, -1.0, -a.shape[1] / _fourth_powers(a.div_(largest.unsqueeze(1))))


@register("baseline", "Granese et al. 2021, arXiv:2106.02395")
def doctor(evidence: Evidence, *, form: Literal["alpha", "beta"] = "alpha") -> Tensor:
    r"""DOCTOR: the odds of an incorrect prediction, by the softmax of the logits.

    With ``g = sum_c p_c^2``, ``alpha`` is ``(1 - g) / g``: the odds that a label drawn from the softmax differs from
    another draw. ``beta`` is ``p_err / (1 - p_err)`` with ``p_err = 1 - max_c p_c``. ``1 - g`` and ``p_err`` are
    computed from the sum of the other probabilities, which stays accurate for confident samples. The paper's variants
    with a temperature and a perturbed input are not included.

    Args:
        form: ``"alpha"`` uses the whole softmax, ``"beta"`` the largest probability.

    Returns:
        A score with values ``(N,)`` in ``[0, C - 1]``.

    Example:
        >>> evidence = Evidence(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
        >>> doctor()(evidence), doctor(form="beta")(evidence)
        (tensor([0.2658, 1.0000], dtype=torch.float64), tensor([0.1353, 1.0000], dtype=torch.float64))

    Reference:
        F. Granese et al., "DOCTOR: A Simple Method for Detecting Misclassification Errors", NeurIPS 2021,
        https://arxiv.org/abs/2106.02395
    """
    softmax = evidence.softmax()
    if form == "beta":
        return softmax.odds
    return softmax.impurity / ((1 - softmax.error).square() + softmax.other_squares)
