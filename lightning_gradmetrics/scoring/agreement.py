"""Checks that a second forward pass agrees with the first: the same logits, and one row per sample."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LOGITS_OF_PARTS", "OTHER_LOGITS", "are_close", "check_same_logits"]

TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-3}
"""Allowed relative difference between two computations of the same logits; 0.05 in half precision."""


OTHER_LOGITS = (
    "returns different logits for the inputs of the step's call than the step did. Pass submodule=, the part of the model that "
    "the step calls; or make its forward deterministic (dropout in eval mode, no state that changes)"
)


LOGITS_OF_PARTS = (
    "returns different logits for the inputs in the batch than the step, which calls its layers or its forward() directly, so the "
    "inputs of the step are not known. Call the model itself, as in self.net(x), or pass submodule=, the part that the step calls"
)


def are_close(first: Tensor, second: Tensor) -> bool:
    """Return whether two computations gave the same logits ``(N, C)``, up to rounding.

    Example:
        >>> are_close(torch.zeros(2, 3), torch.full((2, 3), 1e-6)), are_close(torch.zeros(2, 3), torch.ones(2, 3))
        (True, False)
    """
    return first.shape == second.shape and difference(first, second) <= 1


def difference(first: Tensor, second: Tensor) -> float:
    """Return the largest difference between finite entries, divided by the tolerance."""
    dtypes = (first.dtype, second.dtype)
    tolerance = max(TOLERANCES.get(dtype, 0.05) for dtype in dtypes)
    known = first.isfinite() & second.isfinite()
    if not known.any():
        return 0.0
    left, right = first[known].float(), second[known].float()
    if torch.float64 in dtypes and first.device.type != "mps":
        left, right = first[known].double(), second[known].double()
    scale = torch.maximum(left.abs().max(), right.abs().max()).clamp_min(1e-3)
    return float((left - right).abs().max() / (tolerance * scale))


def check_same_logits(first: Tensor, second: Tensor, message: str) -> None:
    """Raise an error unless two computations gave the same logits ``(N, C)``.

    Raises:
        ValueError: If they differ by more than rounding.
    """
    if first.shape != second.shape:
        raise ValueError(f"{message} (shapes {tuple(first.shape)} and {tuple(second.shape)})")
    if difference(first, second) > 1:
        largest = float((first - second).abs().nan_to_num().max())
        raise ValueError(f"{message} (the largest difference is {largest:.3g})")
