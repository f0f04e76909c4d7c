"""Floating types of gradients, of their moments and of results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "accumulator",
    "allows_tf32",
    "at_least_float32",
    "full_float32",
    "precision_of",
    "result_dtype",
    "rounding",
    "wide_dtype",
]

ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3}
HALF, TF32 = 0.1, 0.05
"""Relative rounding error of half precision, and of float32 products in TF32 (10 bits of mantissa)."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for half precision, otherwise ``dtype``."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a half-precision tensor in float32, any other tensor unchanged."""
    return tensor.to(torch.float32) if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def accumulator(tensor: Tensor) -> torch.dtype:
    """Return the type of the moments of ``tensor``: float64, or float32 on devices without float64."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of results for gradients of ``dtype``: float64 for float64, float32 for every other type."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def rounding(tensor: Tensor) -> float:
    """Return how far two computations of such a tensor may differ by rounding, relative to its largest entries.

    Args:
        tensor: A result of a model's forward or backward pass.
    """
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return HALF
    if tensor.dtype == torch.float32 and device == "cuda" and _tf32():
        return TF32
    return ROUNDING.get(tensor.dtype, HALF)


def precision_of(tensor: Tensor) -> float:
    """Return the relative precision of a tensor that a model computed: that of its type, or of TF32 products."""
    is_tf32 = tensor.dtype == torch.float32 and tensor.device.type == "cuda" and _tf32()
    return 2.0**-10 if is_tf32 else torch.finfo(tensor.dtype).eps


def _tf32() -> bool:
    return allows_tf32(convolutions=False) or allows_tf32(convolutions=True)


def allows_tf32(convolutions: bool) -> bool:
    """Return whether torch computes float32 convolutions, or else matrix products, on CUDA devices as TF32.

    torch has an older setting, ``allow_tf32``, and a newer one, ``fp32_precision``. The older one cannot be read after the
    newer one was changed.

    Args:
        convolutions: Whether to return the setting of convolutions instead of that of matrix products.
    """
    older: Any = torch.backends.cudnn if convolutions else torch.backends.cuda.matmul
    try:
        return bool(older.allow_tf32)
    except RuntimeError:
        newer: Any = torch.backends.cudnn.conv if convolutions else older  # type: ignore[attr-defined, unused-ignore]
        return bool(newer.fp32_precision == "tf32")


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Compute float32 products on a CUDA device in full precision inside the block, regardless of torch's settings.

    torch computes float32 convolutions as TF32 by default. Two correct computations of one gradient then differ in the
    third digit, which makes comparisons meaningless.

    Args:
        device: The device of the computation; nothing is changed for other devices than CUDA's.
    """
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends
    full: bool | str = False
    settings, name = [backends.cuda.matmul, backends.cudnn], "allow_tf32"
    try:
        before = [getattr(setting, name) for setting in settings]
    except RuntimeError:  # the newer setting was changed
        settings, name = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn], "fp32_precision"
        full = "ieee"
        before = [getattr(setting, name) for setting in settings]
    try:
        for setting in settings:
            setattr(setting, name, full)
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setattr(setting, name, value)
