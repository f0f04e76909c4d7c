"""Scores of the logits alone: the baselines, and GradTrust, whose gradient is a function of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradmetrics.evidence import Evidence
from lightning_gradmetrics.scores.registry import register

__all__ = ["energy", "entropy", "gradtrust", "margin", "max_logit", "max_softmax"]


@register("baseline", "Hendrycks & Gimpel 2017, arXiv:1610.02136")
def max_softmax(evidence: Evidence, *, temperature: float = 1.0) -> Tensor:
    r"""One minus the largest softmax probability, ``1 - max_c p_c``, as the sum of all other probabilities."""
    p = torch.softmax(evidence.logits / temperature, 1)
    return p.scatter(1, p.argmax(1, keepdim=True), 0.0).sum(1)


@register("baseline", "Shannon 1948")
def entropy(evidence: Evidence, *, temperature: float = 1.0) -> Tensor:
    r"""Entropy of the softmax in nats, ``-sum_c p_c log p_c``."""
    log_p = torch.log_softmax(evidence.logits / temperature, 1)
    return -(log_p.exp() * log_p).sum(1)


@register("baseline", "Scheffer et al. 2001")
def margin(evidence: Evidence, *, temperature: float = 1.0) -> Tensor:
    r"""Negative margin of the two largest softmax probabilities, ``p_(2) - p_(1)``; the margin itself is its negative."""
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


@register("gradient", "Prabhushankar & AlRegib 2024, IEEE MIPR")
def gradtrust(evidence: Evidence) -> Tensor:
    r"""Negative GradTrust: the largest over the mean variance of the squared head gradient's rows.

    ``trust = C (|a|_inf / |a|_4)^4`` with ``a = z - 1/C``, in ``[1, C]``; the score is ``-trust``. The gradient of the squared
    error between the logits and ``1/C`` with respect to the head's weight is ``a h^T``: the features cancel in the ratio. It is
    not invariant to a shift of the logits.
    """
    logits = evidence.logits
    a = logits - 1 / logits.shape[1]
    # Dividing by the largest entry first keeps the fourth power in range; all-zero rows have equal (zero) rows: trust 1.
    largest = a.abs().amax(1, keepdim=True)
    scaled = torch.where(largest == 0, torch.ones_like(a), a / largest)
    return -1 / scaled.pow(4).mean(1)
