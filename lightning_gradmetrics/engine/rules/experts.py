"""Grouped matrix products of mixtures of experts: a rule for sorted rows, and one product for each expert for other rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.rules.base import Call, rule
from lightning_gradmetrics.engine.tracing.calls import DECOMPOSED
from lightning_gradmetrics.engine.tracing.sorts import GROUPED_PRODUCTS
from lightning_gradmetrics.engine.uses import LinearUse, StackedUse, Use

__all__ = ["grouped", "grouped_product"]


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


def _only_planned(call: Call) -> bool:
    """Return False: the samples of the rows are known only if a plan follows a sort."""
    return False


@rule(*GROUPED_PRODUCTS, arguments="input weight offs bias out_dtype", weights="weight", accepts=_only_planned)
def grouped(call: Call, g: Tensor) -> Iterator[tuple[str, Use]]:
    """The gradient of an expert's matrix is ``sum_r x_r g_r^T`` over the rows of each sample in its group.

    Args:
        call: The call, with the sample of each row as ``owners``, ``(R,)``.
        g: The gradient of its output, ``(R, O)``.
    """
    x, owners, ends = call.values["input"].to(g.dtype), call.values["owners"], call.values["offs"]
    size, start = len(owners) // call.axis.times, 0
    parts: dict[int, Use] = {}
    for expert, end in enumerate(ends.tolist()):
        rows = slice(start, end)
        places, times = _places(owners[rows], size)
        parts[expert] = LinearUse(_padded(x[rows], places, size, times), _padded(g[rows], places, size, times), True)
        start = end
    yield "weight", StackedUse(parts, len(parts))


def _places(owners: Tensor, size: int) -> tuple[Tensor, int]:
    """Return the place of each row in a table with as many rows for each sample, and this number.

    Example:
        >>> _places(torch.tensor([1, 0, 1]), 2)
        (tensor([2, 0, 3]), 2)
    """
    counts = torch.bincount(owners, minlength=size)
    order = owners.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    times = max(1, int(counts.max()))
    return owners * times + rank - starts[owners], times


def _padded(rows: Tensor, places: Tensor, size: int, times: int) -> Tensor:
    """Return rows ``(R, D)`` as ``(N, times, D)``, with zeros where a sample has fewer rows."""
    table = rows.new_zeros(size * times, rows.shape[1])
    return table.index_copy_(0, places, rows).view(size, times, rows.shape[1])


if hasattr(torch, "_grouped_mm"):
    DECOMPOSED[torch._grouped_mm] = grouped_product
