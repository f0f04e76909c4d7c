"""Post-hoc scores of the logits with a parameter: generalised entropy, and the largest of the normalised logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.powers import power_sum
from lightning_gradmetrics.scoring.arguments import Count, Norm, Share
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.registry import register

__all__ = ["gen", "max_logit_pnorm"]


@register("baseline", "Liu et al. 2023, CVPR")
def gen(evidence: Evidence, *, gamma: Share = 0.1, top: Count | None = None) -> Tensor:
    r"""GEN: generalised entropy of the softmax, ``sum_c p_c^gamma (1 - p_c)^gamma``.

    ``1 - p`` of the likeliest class is computed as the sum of the others, which stays accurate for confident samples.
    pytorch-ood returns the mean over the classes, which ranks the same.

    Args:
        gamma: The exponent.
        top: Use only this number of largest probabilities; the paper uses 100 for ImageNet. ``None`` uses all.

    Returns:
        A score with values ``(N,)``, at least 0.

    Example:
        >>> evidence = Evidence(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
        >>> gen()(evidence)
        tensor([1.5964, 1.7411], dtype=torch.float64)

    Reference:
        X. Liu, Y. Lochman and C. Zach, "GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection", CVPR
        2023, https://github.com/XixiLiu95/GEN
    """
    softmax = evidence.softmax()
    if top is None or top >= evidence.logits.shape[1]:
        likeliest = (softmax.error * (1 - softmax.error)).pow(gamma)
        return likeliest + softmax.powers_of_others(gamma, gamma)
    probabilities = softmax.probabilities
    terms = (probabilities * softmax.complements).pow(gamma)
    return terms.gather(1, probabilities.topk(top, 1).indices).sum(1)


@register("baseline", "Cattelan & Silva 2024, arXiv:2305.15508")
def max_logit_pnorm(evidence: Evidence, *, p: Norm = 5.0) -> Tensor:
    r"""Negative largest logit of the logits divided by their p-norm, ``-max_c z_c / |z|_p``.

    It ranks errors of classifiers whose softmax ranks them badly. The paper chooses p on held-out data, and falls back
    to the softmax if that is better.

    Args:
        p: The p of the norm.

    Returns:
        A score with values ``(N,)`` in ``[-1, 1]``; 0 if all logits are 0.

    Example:
        >>> evidence = Evidence(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        >>> max_logit_pnorm(p=2)(evidence)
        tensor([-0.8000, -0.0000], dtype=torch.float64)

    Reference:
        L. Cattelan and D. Silva, "How to Fix a Broken Confidence Estimator: Evaluating Post-hoc Methods for Selective
        Classification with Deep Neural Networks", UAI 2024, https://arxiv.org/abs/2305.15508
    """
    logits = evidence.given_logits.detach()
    largest = logits.amax(1).to(evidence.dtype)
    if math.isinf(p):
        norm = torch.maximum(largest, -logits.amin(1).to(evidence.dtype))
    else:
        norm = power_sum(logits, p, evidence.dtype).pow(1 / p)
    return -largest / norm.clamp(min=torch.finfo(norm.dtype).tiny)
