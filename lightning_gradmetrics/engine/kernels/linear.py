"""Linear layers with a sequence axis, and embeddings."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.fused import fused_products, fused_supports
from lightning_gradmetrics.engine.kernels.geometry import POINTWISE
from lightning_gradmetrics.engine.kernels.gram import linear_gram_pays, linear_square
from lightning_gradmetrics.engine.kernels.layers import looked_up_rows
from lightning_gradmetrics.engine.kernels.native import native_products, supports
from lightning_gradmetrics.engine.kernels.operators import operator
from lightning_gradmetrics.engine.kernels.reduction import chosen_moments, chunked_moments, row_moments
from lightning_gradmetrics.engine.kernels.totals import PositionTotals, empty_results, new_totals, operator_results
from lightning_gradmetrics.engine.kernels.traced import in_graph, key_names, keys_of, named_moments
from lightning_gradmetrics.gradients.precision import at_least_float32
from lightning_gradmetrics.gradients.statistics import Moment, Moments, accumulator

__all__ = ["embedding_moments", "linear_gradient", "linear_moments", "touched_rows"]


def linear_gradient(a: Tensor, g: Tensor) -> Tensor:
    """Return per-sample weight gradients of a linear layer, ``G_n = sum_t g_nt a_nt^T``.

    Args:
        a: The layer's input, ``(N, T, I)``.
        g: The gradient of its output, ``(N, T, O)``.

    Returns:
        ``(N, O, I)``.

    Example:
        >>> linear_gradient(torch.ones(1, 3, 2), torch.ones(1, 3, 1))
        tensor([[[3., 3.]]])
    """
    return g.mT @ a.to(g.dtype)


def linear_moments(a: Tensor, g: Tensor, wanted: Iterable[Moment], totals: PositionTotals | None = None) -> Moments:
    """Return moments of the per-sample weight gradients of a linear layer with a sequence axis.

    Args:
        a: The layer's input, ``(N, T, I)``.
        g: The gradient of its output, ``(N, T, O)``.
        wanted: The moments to compute.
        totals: Receives the sums of ``g`` over the positions, if the kernel reads ``g`` anyway.

    Returns:
        Each moment of the ``O I`` entries, ``(N,)``.

    Example:
        >>> linear_moments(torch.ones(1, 3, 2), torch.ones(1, 3, 1), ["sum"])
        {'sum': tensor([6.], dtype=torch.float64)}
    """
    keys = frozenset(wanted)
    if g.numel() and keys != {"sum"} and fused_supports(g, keys) and a.dtype == g.dtype:
        return fused_products(a.mT, g.mT, POINTWISE, keys, convolution=False)
    if in_graph(g):
        names = key_names(keys)
        rows, *sums = _linear_moments(a, g, names, totals is not None)
        if totals is not None:
            totals.value = sums[0]
        return named_moments(rows, names)
    return _unfused(a, g, keys, totals)


@operator(
    "(Tensor a, Tensor g, str names, bool with_totals) -> Tensor[]",
    lambda a, g, names, with_totals: empty_results(g, len(keys_of(names)), g.shape[2] if with_totals else 0),
)
def _linear_moments(a: Tensor, g: Tensor, names: str, with_totals: bool) -> list[Tensor]:
    totals = PositionTotals() if with_totals else None
    return operator_results(_unfused(a, g, frozenset(keys_of(names)), totals), names, totals, g.mT)


def _unfused(a: Tensor, g: Tensor, keys: frozenset[Moment], totals: PositionTotals | None = None) -> Moments:
    """Return the moments on a CPU, or by plain torch."""
    a, g = at_least_float32(a), at_least_float32(g)
    if keys == {"sum"}:
        return {"sum": _total(a, g)}
    a = a.to(g.dtype)
    gram = 2.0 in keys and keys <= {"sum", 2.0} and g.numel() > 0
    if gram and linear_gram_pays(a, g):
        moments = linear_square(a, g, "sum" in keys, totals)
        if keys > moments.keys():
            moments["sum"] = _total(a, g)
        return chosen_moments(moments, keys)
    if g.numel() and supports(g, keys):
        return native_products(a.mT, g.mT, POINTWISE, keys, bias=new_totals(totals, g.mT))
    return chunked_moments(lambda rows: linear_gradient(a[rows], g[rows]), g, a.shape[2] * g.shape[2], keys)


def _total(a: Tensor, g: Tensor) -> Tensor:
    """Return the sum of the gradient's entries, ``sum_t (1 . g_t)(1 . a_t)``."""
    dtype = accumulator(g)
    return (a.sum(2, dtype=dtype) * g.sum(2, dtype=dtype)).sum(1)


MOST_COMPARED = 64
"""Largest number of indices per sample that are compared with each other; more are sorted."""


def _slots(indices: Tensor) -> Tensor:
    """Return a number from 0 to T - 1 for each index, ``(N, T)``, the same for equal indices of a sample."""
    if 0 < indices.shape[1] <= MOST_COMPARED:
        equal = indices.unsqueeze(2) == indices.unsqueeze(1)
        return equal.to(torch.int8).argmax(1)  # the position of the first equal index
    ordered, order = indices.sort(1)
    fresh = torch.ones_like(ordered)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.empty_like(indices).scatter_(1, order, fresh.cumsum(1) - 1)


def touched_rows(indices: Tensor, g: Tensor, padding_idx: int | None) -> Tensor:
    """Return the gradients of the rows of a table that each sample looks up, and rows of zeros, ``(N, T + 1, D)``.

    Args:
        indices: Rows of the table ``(N, T)``.
        g: The gradient of the layer's output, ``(N, T, D)``.
        padding_idx: The row without a gradient, or ``None``.

    Example:
        >>> touched_rows(torch.tensor([[7, 7]]), torch.ones(1, 2, 1), None)
        tensor([[[2.],
                 [0.],
                 [0.]]])
    """
    g = at_least_float32(g)
    return _touched_rows(indices, g, padding_idx)


@operator(
    "(Tensor indices, Tensor g, int? padding) -> Tensor",
    lambda indices, g, padding: g.new_empty(g.shape[0], g.shape[1] + 1, g.shape[2]),
)
def _touched_rows(indices: Tensor, g: Tensor, padding_idx: int | None) -> Tensor:
    computed = looked_up_rows(indices, g, padding_idx)
    if computed is not None:
        return computed
    if padding_idx is not None:
        g = g.masked_fill((indices == padding_idx).unsqueeze(-1), 0)
    rows = g.new_zeros(g.shape[0], g.shape[1] + 1, g.shape[2])
    return rows.scatter_add_(1, _slots(indices).unsqueeze(-1).expand_as(g), g)


def _table_rows(indices: Tensor, g: Tensor, padding_idx: int | None, num_embeddings: int) -> Tensor:
    """Return the gradients of all rows of a table, ``(N, V, D)``."""
    if padding_idx is not None:
        g = g.masked_fill((indices == padding_idx).unsqueeze(-1), 0)
    table = g.new_zeros(len(g), num_embeddings, g.shape[2])
    return table.scatter_add_(1, indices.unsqueeze(-1).expand_as(g), g)


def embedding_moments(
    indices: Tensor, g: Tensor, num_embeddings: int, padding_idx: int | None, wanted: Iterable[Moment]
) -> Moments:
    """Return moments of the per-sample weight gradients of an embedding, without the ``(N, V, D)`` tensor.

    Args:
        indices: Rows of the table ``(N, T)``.
        g: The gradient of the layer's output, ``(N, T, D)``.
        num_embeddings: Number of rows ``V`` of the table. Rows that a sample does not touch count as zeros.
        padding_idx: The row without a gradient, or ``None``.
        wanted: The moments to compute.

    Returns:
        Each moment of the ``V D`` entries, ``(N,)``.

    Example:
        >>> embedding_moments(torch.tensor([[2, 2]]), torch.ones(1, 2, 3), 5, None, ["max", "min"])["max"]
        tensor([2.], dtype=torch.float64)
    """
    keys, g = frozenset(wanted), at_least_float32(g)
    has_untouched_rows = indices.shape[1] < num_embeddings
    if has_untouched_rows or keys.isdisjoint({"max", "min"}):  # the further zeros change no moment
        return row_moments(_touched_rows(indices, g, padding_idx).flatten(1), keys)
    return row_moments(_table_rows(indices, g, padding_idx, num_embeddings).flatten(1), keys)
