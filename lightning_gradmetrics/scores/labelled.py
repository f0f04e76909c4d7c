"""Scores of the true label: GraNd, EL2N and the negative log-likelihood."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.objectives import class_loss
from lightning_gradmetrics.scoring.arguments import Norm
from lightning_gradmetrics.scoring.evidence import Evidence, Target
from lightning_gradmetrics.scoring.registry import register

__all__ = ["el2n", "grand", "nll"]


@register("gradient", "Paul et al. 2021, arXiv:2107.07075")
def grand(evidence: Evidence, *, p: Norm = 2.0, target: Target = "all") -> Tensor:
    r"""GraNd: norm of the gradient of the cross-entropy to the true label, ``|grad -log p_y|``.

    It needs the label of every sample, and identifies hard and mislabelled samples. The paper averages over models
    early in training; this is the value of one model, so average the columns of several. On the head's weight
    (``target="head"``) it is ``|h|_p |softmax(z) - e_y|_p``.

    Args:
        p: The p of the norm; the paper uses 2.
        target: The parameters: ``"all"``, as in the paper, ``"head"``, a pattern such as ``"layer4.*"``, or a predicate
            on the name.

    Returns:
        A score with values ``(N,)``, at least 0.

    Example:
        >>> logits, labels = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
        >>> evidence = Evidence(logits, given_features=torch.ones(2, 3), given_labels=labels)
        >>> grand(target="head")(evidence)
        tensor([0.2920, 2.1575], dtype=torch.float64)

    Reference:
        M. Paul, S. Ganguli and G. Dziugaite, "Deep Learning on a Data Diet: Finding Important Examples Early in
        Training", NeurIPS 2021, https://arxiv.org/abs/2107.07075
    """
    return evidence.gradient("label", target).norm(p)


@register("baseline", "Paul et al. 2021, arXiv:2107.07075")
def el2n(evidence: Evidence) -> Tensor:
    r"""EL2N: norm of the error of the prediction, ``|p - e_y|_2`` with the true label ``y``.

    It needs the label of every sample. The paper averages over models early in training; this is the value of one
    model. It equals GraNd on the head divided by the feature norm.

    Returns:
        A score with values ``(N,)`` in ``[0, sqrt(2)]``.

    Example:
        >>> evidence = Evidence(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), given_labels=torch.tensor([0, 1]))
        >>> el2n()(evidence)
        tensor([0.1686, 1.2456], dtype=torch.float64)

    Reference:
        M. Paul, S. Ganguli and G. Dziugaite, "Deep Learning on a Data Diet: Finding Important Examples Early in
        Training", NeurIPS 2021, https://arxiv.org/abs/2107.07075
    """
    residual = evidence.softmax().residual(evidence.labels.clamp(min=0))
    norm: Tensor = torch.linalg.vector_norm(residual, 2, 1)
    return norm


@register("baseline", "Malinin & Gales 2021, arXiv:2002.07650")
def nll(evidence: Evidence) -> Tensor:
    r"""Negative log-likelihood of the true label, ``-log p_y``, in nats.

    It needs the label of every sample. For a token of a language model the label is the token itself; the exponential of
    the mean over a sequence is its perplexity.

    Returns:
        A score with values ``(N,)``, at least 0.

    Example:
        >>> logits, labels = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
        >>> nll()(Evidence(logits, given_labels=labels))
        tensor([0.1269, 2.1269], dtype=torch.float64)

    Reference:
        A. Malinin and M. Gales, "Uncertainty Estimation in Autoregressive Structured Prediction", ICLR 2021,
        https://arxiv.org/abs/2002.07650
    """
    return class_loss(evidence.logits, evidence.labels.clamp(min=0))
