"""A sample's influence on itself, in the metric of the Fisher information."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.objectives import class_residual
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.fitted import Tensors, register_fitted

__all__ = ["kfac_influence"]


@register_fitted("gradient", "Grosse et al. 2023, arXiv:2308.03296; Martens & Grosse 2015, arXiv:1503.05671")
class kfac_influence:
    r"""Influence of a sample on itself through the head, ``(g^T G^-1 g) (h^T A^-1 h)``, with K-FAC's factors.

    ``g`` is the gradient of the cross-entropy to the predicted class at the logits, ``h`` the head's input with a one
    for the bias; ``G`` is the mean of ``diag(p) - p p^T`` and ``A`` the mean of ``h h^T`` over in-distribution data. To
    each factor ``damping`` times its mean eigenvalue is added.
    """

    @staticmethod
    def measure(evidence: Evidence, *, damping: float = 1e-3) -> Tensors:
        """The gradient of the logits, the probabilities, and the head's input with a one."""
        if not damping > 0:
            raise ValueError(f"damping is {damping}; it must be above 0, since G has a zero eigenvalue by construction")
        logits, features = evidence.logits, evidence.features
        return {
            "output": class_residual(logits, logits.argmax(1)),
            "probabilities": torch.softmax(logits, 1),
            "features": torch.cat([features, features.new_ones(len(features), 1)], 1),
        }

    @staticmethod
    def accumulate(evidence: Evidence, measured: Tensors, **_: Any) -> Tensors:
        """The sums of the factors."""
        p, h = measured["probabilities"], measured["features"]
        return {"output": torch.diag(p.sum(0)) - p.T @ p, "features": h.T @ h, "count": torch.tensor(float(len(p)))}

    @staticmethod
    def finish(total: Tensors, *, damping: float = 1e-3) -> Tensors:
        """The inverses of the damped means."""
        return {key: _damped_inverse(total[key] / total["count"], damping) for key in ("output", "features")}

    @staticmethod
    def score(measured: Tensors, state: Tensors, **_: Any) -> Tensor:
        """The product of the two quadratic forms."""
        return _quadratic(measured["output"], state["output"]) * _quadratic(measured["features"], state["features"])


def _damped_inverse(matrix: Tensor, damping: float) -> Tensor:
    """The inverse of ``matrix + damping * mean eigenvalue * identity``, in float64."""
    matrix = matrix.double()
    size = len(matrix)
    added = damping * matrix.diagonal().mean().clamp(min=torch.finfo(matrix.dtype).tiny)
    inverse: Tensor = torch.linalg.inv(matrix + added * torch.eye(size, dtype=matrix.dtype))
    return inverse


def _quadratic(rows: Tensor, matrix: Tensor) -> Tensor:
    """``x^T M x`` for each row ``x``: ``(N, D), (D, D) -> (N,)``."""
    return ((rows @ matrix.to(rows.dtype)) * rows).sum(1)
