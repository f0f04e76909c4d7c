"""The influence of a sample on itself, measured with the Fisher information."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.objectives import class_residual
from lightning_gradmetrics.scoring.arguments import Positive
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.fitted import FittedScore
from lightning_gradmetrics.scoring.registry import register
from lightning_gradmetrics.scoring.totals import Tensors

__all__ = ["kfac_influence"]


@register("gradient", "Grosse et al. 2023, arXiv:2308.03296; Martens & Grosse 2015, arXiv:1503.05671")
class kfac_influence(FittedScore):
    r"""Influence of a sample on itself through the head, ``(g^T G^-1 g) (h^T A^-1 h)``, with K-FAC's factors.

    ``g`` is the gradient of the cross-entropy to the predicted class with respect to the logits, ``h`` the head's input
    with a one for the bias. ``G`` is the mean of ``diag(p) - p p^T`` and ``A`` the mean of ``h h^T`` over in-distribution
    data. The fit needs no labels; its memory is that of the two matrices.

    Args:
        damping: This multiple of its mean eigenvalue is added to each factor, because ``G`` has an eigenvalue 0 by
            construction.

    Example:
        >>> import lightning_gradmetrics as lgm
        >>> model, images = torch.nn.Linear(4, 3), torch.randn(20, 4)
        >>> fitted = lgm.fit(model, [images], kfac_influence())
        >>> bool((lgm.score(model, images, fitted)["kfac_influence"] >= 0).all())
        True

    Reference:
        R. Grosse et al., "Studying Large Language Model Generalization with Influence Functions", 2023,
        https://arxiv.org/abs/2308.03296; J. Martens and R. Grosse, "Optimizing Neural Networks with Kronecker-factored
        Approximate Curvature", ICML 2015, https://arxiv.org/abs/1503.05671
    """

    damping: Positive = 1e-3

    def measure(self, evidence: Evidence) -> Tensors:
        logits, features = evidence.logits, evidence.features
        return {
            "output": class_residual(logits, logits.argmax(1)),
            "probabilities": torch.softmax(logits, 1),
            "features": torch.cat([features, features.new_ones(len(features), 1)], 1),
        }

    def accumulate(self, evidence: Evidence, measured: Tensors) -> Tensors:
        p, h = measured["probabilities"], measured["features"]
        return {"output": torch.diag(p.sum(0)) - p.T @ p, "features": h.T @ h, "count": torch.tensor(float(len(p)))}

    def finish(self, total: Tensors) -> Tensors:
        count = total.pop("count")
        return {key: _damped_inverse(factor / count, self.damping) for key, factor in total.items()}

    def score(self, measured: Tensors, state: Tensors) -> Tensor:
        return _quadratic(measured["output"], state["output"]) * _quadratic(measured["features"], state["features"])


def _damped_inverse(matrix: Tensor, damping: float) -> Tensor:
    """Return the inverse of ``matrix + damping * mean eigenvalue * identity``, in float64."""
    matrix = matrix.double()
    size = len(matrix)
    added = damping * matrix.diagonal().mean().clamp(min=torch.finfo(matrix.dtype).tiny)
    inverse: Tensor = torch.linalg.inv(matrix + added * torch.eye(size, dtype=matrix.dtype))
    return inverse


def _quadratic(rows: Tensor, matrix: Tensor) -> Tensor:
    """``x^T M x`` for each row ``x``: ``(N, D), (D, D) -> (N,)``."""
    return ((rows @ matrix.to(rows.dtype)) * rows).sum(1)
