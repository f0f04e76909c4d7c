"""Pixel-wise gradient norms as the published code computes them, which are not norms of the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from lightning_gradmetrics.gradients.output_gradients import LogitGradient
from lightning_gradmetrics.gradients.statistics import Moment
from lightning_gradmetrics.scoring.arguments import Norm
from lightning_gradmetrics.scoring.evidence import Evidence, HeadGradient
from lightning_gradmetrics.scoring.registry import register

__all__ = ["pgn"]


@register("gradient", "Maag & Riedlinger 2023, arXiv:2303.06920")
def pgn(evidence: Evidence, *, p: Norm = 0.5, label: Literal["uniform", "one_hot"] = "uniform") -> Tensor:
    r"""Pixel-wise gradient norm (PGN) as its published code computes it, which is not the norm of the gradient.

    With the softmax ``s``, the predicted class ``y`` and the head's input ``h``, the code computes

    - for the uniform label ``(C - 1) / C |s|_p |h|_p``; the gradient has ``|s - 1/C|_p |h|_p``. At ``p = 1`` the score is
      a constant times the feature norm. At ``p = 0.5`` the first factor grows with the entropy, as ``exp`` of the Renyi
      entropy of order 1/2, while that of the gradient falls.
    - for the one-hot label ``|s (1 - e_y)|_p |h|_p``: entry ``y`` is 0, but in the gradient it is ``s_y - 1``. At ``p =
      1`` the score is half of the gradient's norm; at any other ``p`` it ranks differently.

    The gradient's norms are ``gradnorm(p=p)`` (negated) and ``pseudo_label(statistic="l<p>")``. If the head's
    output is resized, the score is computed from the resized logits; the published code resizes the scores instead.
    On samples and tokens the same formula applies.

    Args:
        p: The p of both norms; the paper uses 0.5 to find out-of-distribution objects.
        label: The label of the loss: ``"uniform"``, the paper's ``PGN_uni``, or ``"one_hot"``, its ``PGN_oh``.

    Returns:
        A score with values ``(N,)``, at least 0.

    Example:
        >>> import torch
        >>> evidence = Evidence(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), given_features=torch.ones(2, 3))
        >>> pgn()(evidence), pgn(p=1, label="one_hot")(evidence)
        (tensor([7.4162, 9.0000], dtype=torch.float64), tensor([0.3576, 1.5000], dtype=torch.float64))

    Reference:
        K. Maag and T. Riedlinger, "Pixel-wise Gradient Uncertainty for Convolutional Neural Networks applied to
        Out-of-Distribution Segmentation", 2023, https://arxiv.org/abs/2303.06920, and its code,
        https://github.com/tobiasriedlinger/uncertainty-gradients-seg
    """
    softmax, share = evidence.softmax(roots=p == 0.5), 1.0
    if label == "uniform":
        share = 1 - 1 / evidence.logits_like.shape[1]

    def factor() -> Tensor:
        probabilities = softmax.probabilities
        return probabilities * share if label == "uniform" else probabilities.masked_fill(softmax.is_top, 0)

    def powers() -> Tensor:
        others = softmax.powers_of_others(p)
        return others if label == "one_hot" else ((1 - softmax.error).pow(p) + others) * share**p

    known: dict[Moment, Callable[[], Tensor]] = {} if math.isinf(p) else {float(p): powers}
    return HeadGradient(LogitGradient(evidence.logits_like, factor, known), evidence.head_input).norm(p)
