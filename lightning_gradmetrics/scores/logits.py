"""Scores of the logits alone: the baselines, and GradTrust, whose gradient is a function of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.objectives import log_probabilities
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.registry import register

__all__ = ["energy", "entropy", "gradtrust", "log_likelihood", "margin", "max_logit", "max_softmax"]


@register("baseline", "Hendrycks & Gimpel 2017, arXiv:1610.02136")
def max_softmax(evidence: Evidence, *, temperature: float = 1.0) -> Tensor:
    r"""One minus the largest softmax probability, ``1 - max_c p_c``, as the sum of all other probabilities."""
    p = torch.softmax(evidence.logits / temperature, 1)
    return p.scatter(1, p.argmax(1, keepdim=True), 0.0).sum(1)


@register("baseline", "Shannon 1948")
def entropy(evidence: Evidence, *, temperature: float = 1.0) -> Tensor:
    r"""Entropy of the softmax in nats, ``-sum_c p_c log p_c``."""
    log_p = log_probabilities(evidence.logits / temperature)
    return -(log_p.exp() * log_p).sum(1)


@register("baseline", "Scheffer et al. 2001")
def margin(evidence: Evidence, *, temperature: float = 1.0) -> Tensor:
    r"""Negative margin of the two largest softmax probabilities, ``p_(2) - p_(1)``; the margin is its negative."""
    first, second = torch.softmax(evidence.logits / temperature, 1).topk(2, 1).values.unbind(1)
    return second - first


@register("baseline", "Liu et al. 2020, arXiv:2010.03759")
def energy(evidence: Evidence, *, temperature: float = 1.0) -> Tensor:
    r"""Free energy of the logits, ``-T log sum_c exp(z_c / T)``."""
    return -temperature * torch.logsumexp(evidence.logits / temperature, 1)


@register("baseline", "Hendrycks et al. 2022, arXiv:1911.11132")
def max_logit(evidence: Evidence) -> Tensor:
    r"""Negative largest logit, ``-max_c z_c``; the largest logit itself is its negative."""
    return -evidence.logits.amax(1)


@register("baseline", "Prabhushankar & AlRegib 2024, arXiv:2405.13758")
def log_likelihood(evidence: Evidence) -> Tensor:
    r"""Negative largest raw logit, which GradTrust's demo calls the log-likelihood: ``max_logit`` under that name."""
    return -evidence.logits.amax(1)


@register("gradient", "Prabhushankar & AlRegib 2024, arXiv:2405.13758")
def gradtrust(evidence: Evidence, *, k: int | None = None) -> Tensor:
    r"""Negative GradTrust: the largest over the mean variance of the squared head gradient's rows.

    The gradient of the squared error between the logits and ``1/C`` with respect to the head's weight is ``2/C a h^T``
    with ``a = z - 1/C``: the features cancel in the ratio, and ``trust = C (|a|_inf / |a|_4)^4``, in ``[1, C]``. The
    paper's trust is the score's negative. It is not invariant to a shift of the logits. No gradient is computed, and no
    power overflows.

    ``k`` counts only the rows of the k classes with the largest logits as counterfactual classes: the trust is then in
    ``[1, k]``. ``None``, or all C of them, is what the paper's demo computes.
    """
    if k is not None and k < 2:
        raise ValueError(f"k={k}: a ratio of classes needs 2 or more of them, or None for all")
    a = evidence.logits - 1 / evidence.logits.shape[1]
    if k is not None and k < a.shape[1]:
        a = a.topk(k, 1).values
    # Divided by the largest entry, the fourth power stays in range; an all-zero sample has equal rows: trust 1.
    largest = a.abs().amax(1, keepdim=True)
    scaled = torch.where(largest == 0, torch.ones_like(a), a / largest)
    return -1 / scaled.pow(4).mean(1)
