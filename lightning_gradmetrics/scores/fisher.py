"""Scores of the Fisher information: its trace at a sample, and the sample's influence on itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.evidence import Evidence, Target
from lightning_gradmetrics.scores.fitted import Tensors, register_fitted
from lightning_gradmetrics.scores.registry import register

__all__ = ["fisher_trace", "kfac_influence"]


@register("gradient", "cf. Igoe et al. 2022, arXiv:2205.10439")
def fisher_trace(evidence: Evidence, *, target: Target = "head") -> Tensor:
    r"""Trace of the Fisher information, ``sum_c p_c |grad -log p_c|_2^2``.

    On the head ``|h|_2^2 (1 - sum_c p_c^2)``. Over other targets it takes one backward pass a class.
    """
    probabilities = torch.softmax(evidence.logits, 1)
    if target == "head":
        return evidence.features.square().sum(1) * (probabilities * (1 - probabilities)).sum(1)
    squares = [evidence.gradient("class", target, index=c).norm(2).square() for c in range(probabilities.shape[1])]
    return (probabilities.to(squares[0].dtype) * torch.stack(squares, 1)).sum(1)


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
        probabilities = torch.softmax(evidence.logits, 1)
        predicted = torch.nn.functional.one_hot(probabilities.argmax(1), probabilities.shape[1])
        features = evidence.features
        return {
            "output": probabilities - predicted.to(probabilities),
            "probabilities": probabilities,
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
