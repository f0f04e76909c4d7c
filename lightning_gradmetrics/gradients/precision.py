"""Floating types: what gradients are computed in, and what their moments are added up in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accumulator", "at_least_float32", "result_dtype", "wide_dtype"]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, otherwise ``dtype``."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def at_least_float32(tensor: Tensor) -> Tensor:
    """A half-precision tensor in float32, any other tensor unchanged."""
    return tensor.to(wide_dtype(tensor.dtype))


def accumulator(tensor: Tensor) -> torch.dtype:
    """The type of the moments of ``tensor``: float64, or float32 on devices without float64."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of results for gradients of ``dtype``: float64 stays, every other type becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
