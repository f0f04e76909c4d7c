"""Grouped matrix products of mixtures of experts, expressed as one product for each expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.tracing.calls import DECOMPOSED

__all__ = ["grouped_product"]


def grouped_product(
    input: Tensor, weight: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> Tensor:
    """Return the product of each group of rows with the matrix of its expert.

    Args:
        input: The rows ``(M, K)``, sorted by expert.
        weight: The matrices ``(E, K, N)``.
        offs: The end of each expert's rows, ``(E,)``.
        bias: Not used by torch yet; other forms of the function than this one run unchanged.
        out_dtype: The type of the result, by default that of the input.
    """
    if offs is None or bias is not None or out_dtype is not None or (input.ndim, weight.ndim) != (2, 3):
        result: Tensor = torch._grouped_mm(input, weight, offs=offs, bias=bias, out_dtype=out_dtype)
        return result
    products, start = [], 0
    with torch.autocast(input.device.type, enabled=False):  # which leaves the type of grouped products unchanged
        for expert, end in enumerate(offs.tolist()):
            products.append(input[start:end] @ weight[expert])
            start = end
    products.append(input.new_zeros(len(input) - start, weight.shape[2]))
    return torch.cat(products)


if hasattr(torch, "_grouped_mm"):
    DECOMPOSED[torch._grouped_mm] = grouped_product
