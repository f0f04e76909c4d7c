"""GradOrth: the gradient projected onto the subspace of the in-distribution features."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradmetrics.scoring.arguments import Share
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.fitted import FittedScore
from lightning_gradmetrics.scoring.registry import register
from lightning_gradmetrics.scoring.totals import Tensors

__all__ = ["gradorth", "leading_directions"]


@register("gradient", "Behpour et al. 2023, arXiv:2308.00310")
class gradorth(FittedScore):
    r"""Negative norm of the head's gradient projected onto the subspace of in-distribution features.

    ``-|G M|_2`` with ``G = g h^T`` the gradient of the head's weight and ``M`` the leading right singular vectors of
    the matrix of in-distribution features ``h`` (not centred). In closed form it is ``-|g|_2 |M^T h|_2``. The loss is the
    cross-entropy to the uniform distribution, ``g = p - 1/C``, as in ``gradnorm``. The fit needs no labels. It is
    streaming and accumulates the second moment ``sum h h^T``, D x D numbers.

    The paper's abstract states the projection and its sign. The loss and the default of ``energy`` follow another
    implementation and were not checked in the paper itself.

    Args:
        energy: ``M`` has the fewest vectors whose squared singular values reach this fraction of their sum.
            ``energy=1`` is ``gradnorm(p=2)`` on data within the span of the features.

    Example:
        >>> import lightning_gradmetrics as lgm
        >>> model, images = torch.nn.Linear(4, 3), torch.randn(20, 4)
        >>> fitted = lgm.fit(model, [images], gradorth(energy=0.9))
        >>> bool((lgm.score(model, images, fitted)["gradorth(energy=0.9)"] <= 0).all())
        True

    Reference:
        S. Behpour et al., "GradOrth: A Simple yet Efficient Out-of-Distribution Detection with Orthogonal Projection of
        Gradients", NeurIPS 2023, https://arxiv.org/abs/2308.00310
    """

    energy: Share = 0.97

    def measure(self, evidence: Evidence) -> Tensors:
        probabilities = torch.softmax(evidence.logits, 1)
        output = torch.linalg.vector_norm(probabilities - 1 / probabilities.shape[1], 2, 1)
        return {"output": output, "features": evidence.features}

    def accumulate(self, evidence: Evidence, measured: Tensors) -> Tensors:
        return {"features": measured["features"].T @ measured["features"]}

    def finish(self, total: Tensors) -> Tensors:
        return {"directions": leading_directions(total["features"], self.energy)}

    def score(self, measured: Tensors, state: Tensors) -> Tensor:
        inside: Tensor = torch.linalg.vector_norm(measured["features"] @ state["directions"], 2, 1)
        return -measured["output"] * inside


def leading_directions(moment: Tensor, energy: float) -> Tensor:
    """Return the fewest eigenvectors whose eigenvalues reach a fraction of their sum: ``(D, R)``.

    Args:
        moment: A second moment ``(D, D)``.
        energy: The fraction.

    Raises:
        ValueError: If the moment is zero.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if not values[0] > 0:
        raise ValueError("the head's inputs to fit 'gradorth' on are all zero: there is no subspace to project onto")
    reached = values.cumsum(0) / values.sum() >= energy - 1e-12  # so that rounding does not make 1 unreachable
    leading: Tensor = vectors[:, : int(reached.long().argmax()) + 1]
    return leading
