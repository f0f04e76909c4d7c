"""Scores of the true label, for auditing labelled data: GraNd and EL2N."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.objectives import class_residual
from lightning_gradmetrics.scoring.evidence import Evidence, Target
from lightning_gradmetrics.scoring.registry import register

__all__ = ["el2n", "grand"]


@register("gradient", "Paul et al. 2021, arXiv:2107.07075")
def grand(evidence: Evidence, *, p: float = 2.0, target: Target = "all") -> Tensor:
    r"""GraNd: norm of the gradient of the cross-entropy to the true label, ``|grad -log p_y|``.

    It needs the label of every sample, and finds hard and mislabelled ones. The paper takes the L2 norm over all
    parameters and averages over models early in training: this is one model's, so average the columns of several. On the
    head (``target="head"``) it is ``|h|_p |p - e_y|_p``.
    """
    return evidence.gradient("label", target).norm(p)


@register("baseline", "Paul et al. 2021, arXiv:2107.07075")
def el2n(evidence: Evidence) -> Tensor:
    r"""EL2N: norm of the error of the prediction, ``|p - e_y|_2`` with the true label ``y``.

    It needs the label of every sample. The paper averages over models early in training: this is one model's. It is
    GraNd on the head without the feature norm.
    """
    norm: Tensor = torch.linalg.vector_norm(class_residual(evidence.logits, evidence.labels), 2, 1)
    return norm
