"""Products of linear layers by oneDNN, on processors where it is faster than MKL.

PyTorch multiplies float32 matrices with MKL, which uses half of the vector units of AMD processors with AVX-512. Its convolutions
use oneDNN, which uses all of them, and a linear layer is a convolution with a kernel of one pixel.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_gradmetrics.engine.kernels.operators import is_traced

__all__ = ["computes", "linear", "product"]

SMALLEST_PRODUCT = 2**23
"""Multiplications from which a convolution is faster, although it needs more time to start."""

SMALLEST_STEP = 2**20
"""Multiplications from which the product of few rows is faster."""

FEWEST_ROWS = 64
"""Rows from which a convolution is faster."""


@lru_cache(maxsize=1)
def _is_faster() -> bool:
    """Return whether the processor is made by AMD and has AVX-512, as far as torch tells."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    is_amd = "AMD" in capabilities.get("cpu_name", "") and capabilities.get("avx512_f", False)
    return bool(is_amd and torch._C.has_mkl and torch._C._has_mkldnn)


def _is_allowed(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN multiplies tensors of these types in float32, as MKL does."""
    if x.dtype != torch.float32 or not x.is_cpu or weight.dtype != torch.float32 or not _is_faster() or is_traced():
        return False
    settings: Any = torch.backends.mkldnn
    if torch.is_autocast_enabled("cpu") or not settings.enabled:
        return False
    return {settings.matmul.fp32_precision, settings.conv.fp32_precision} <= {"none", "ieee"}


def computes(x: Tensor, weight: Tensor) -> bool:
    """Return whether :func:`linear` is faster than torch's own function, for ``x`` ``(..., D)`` and a matrix of weights."""
    rows = x.numel() // max(x.shape[-1], 1)
    is_large = rows >= FEWEST_ROWS and rows * weight.numel() >= SMALLEST_PRODUCT
    return is_large and _images(rows) > 1 and _is_allowed(x, weight)


def _images(rows: int) -> int:
    """Return a number of images into which rows can be divided; 1 if there is no small one."""
    return next((count for count in (2, 3, 5, 7) if rows % count == 0), 1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x W^T + b``, ``(..., O)``, from ``x`` ``(..., D)``, ``weight`` ``(O, D)`` and ``bias`` ``(O,)``.

    The rows are taken for the pixels of a few images of one column. torch computes their convolution with a kernel of one pixel by
    oneDNN if there are several images, and if it has a dilation, which changes nothing.
    """
    count = _images(x.numel() // x.shape[-1])
    images = x.reshape(count, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    result = F.conv2d(images, weight.contiguous()[:, :, None, None], bias, dilation=2)
    return result.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """Return ``x M``, ``(N, O)``, of few rows ``x`` ``(N, D)``, without a graph of autograd."""
    if x.numel() * matrix.shape[1] < SMALLEST_STEP or not _is_allowed(x, matrix):
        return x @ matrix
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, matrix.t(), None, "none", [], "")
    return result
