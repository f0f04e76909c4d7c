"""GradOrth: the gradient's part in the subspace of the in-distribution features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.fitted import Tensors, register_fitted

__all__ = ["gradorth"]


@register_fitted("gradient", "Behpour et al. 2023, arXiv:2308.00310")
class gradorth:
    r"""Negative norm of the head's gradient projected onto the subspace of in-distribution features.

    ``-|G M|_2`` with ``G = g h^T`` the gradient of the head's weight and ``M`` the leading right singular vectors of
    the matrix of in-distribution features ``h`` (not centred): the fewest that hold the share ``energy`` of the sum of
    its squared singular values. In closed form it is ``-|g|_2 |M^T h|_2``. The fit keeps the second moment ``sum h
    h^T``, so it streams in memory of D x D.

    The loss is the cross-entropy to the uniform distribution, ``g = p - 1/C``, as in ``gradnorm``; ``energy=1`` is
    ``gradnorm(p=2)`` on data within the span of the features. The paper's abstract gives the projection and its sign;
    the loss and the share 0.97 follow another implementation, and were not checked in the paper itself.
    """

    @staticmethod
    def measure(evidence: Evidence, *, energy: float = 0.97) -> Tensors:
        """The norm of the logits' gradient, and the head's input."""
        if not 0 < energy <= 1:
            raise ValueError(f"energy is {energy}; it is a share of the features' squared norm, above 0 and at most 1")
        probabilities = torch.softmax(evidence.logits, 1)
        output = torch.linalg.vector_norm(probabilities - 1 / probabilities.shape[1], 2, 1)
        return {"output": output, "features": evidence.features}

    @staticmethod
    def accumulate(evidence: Evidence, measured: Tensors, **_: Any) -> Tensors:
        """The second moment of the features."""
        return {"features": measured["features"].T @ measured["features"]}

    @staticmethod
    def finish(total: Tensors, *, energy: float = 0.97) -> Tensors:
        """The leading directions, ``(D, R)``."""
        return {"directions": leading_directions(total["features"], energy)}

    @staticmethod
    def score(measured: Tensors, state: Tensors, **_: Any) -> Tensor:
        """The product of the two norms."""
        inside: Tensor = torch.linalg.vector_norm(measured["features"] @ state["directions"], 2, 1)
        return -measured["output"] * inside


def leading_directions(moment: Tensor, energy: float) -> Tensor:
    """The fewest eigenvectors of a second moment ``(D, D)`` whose eigenvalues sum to that share of all: ``(D, R)``.

    Raises:
        ValueError: If the moment is zero.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if not values[0] > 0:
        raise ValueError("the head's inputs to fit 'gradorth' on are all zero: there is no subspace to project onto")
    reached = values.cumsum(0) / values.sum() >= energy - 1e-12  # the sums round: 1 must be within reach
    leading: Tensor = vectors[:, : int(reached.long().argmax()) + 1]
    return leading
