"""Detects whether a step passed the samples of a batch to the model in a different order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = [
    "CERTAIN_BITS",
    "LIKELY_BITS",
    "RowOrder",
    "is_partly_equal",
    "order_of_equal_rows",
    "order_of_part",
    "row_order",
    "some_entries",
    "summaries",
]

COLUMNS = 16
"""Number of summaries of each sample that are compared."""

CERTAIN_BITS = 30
"""Bits of information that summaries must contain before equal orders count as proof."""


LIKELY_BITS = 14
"""Bits of information from which a different order is likely."""


@dataclass(frozen=True)
class RowOrder:
    """The order of the samples that a model received.

    Args:
        order: The position of each sample in the batch ``(N,)``, or ``None`` if the order is the same or unknown.
        bits: Evidence for a different order, in bits, if the values of the batch were changed.
    """

    order: Tensor | None = None
    bits: float = 0.0


def row_order(received: Sequence[Tensor], batch: Sequence[Tensor]) -> RowOrder | None:
    """Return the order of the samples that the model received, or ``None`` if nothing is comparable.

    Only tensors of the same shape are compared.

    Args:
        received: The tensors that the model received, one row per sample.
        batch: The tensors of the batch.

    Example:
        >>> x = torch.tensor([[1.0, 5.0], [2.0, 4.0], [3.0, 6.0]])
        >>> row_order([x[[2, 0, 1]]], [x]).order, row_order([x], [x]).order
        (tensor([2, 0, 1]), None)
    """
    pairs = _pairs(received, batch)
    if not pairs:
        return None
    if len(pairs) > 1:  # many equal rows, as in masks, do not determine the order
        pairs.sort(key=_distinct_rows, reverse=True)
    for first, second in pairs:
        order = None if torch.equal(first, second) else order_of_equal_rows(first, second)
        if order is not None or torch.equal(first, second):
            return RowOrder(_order_of_all(received, batch, order))
    return RowOrder(bits=max(_bits_of_other_order(first, second) for first, second in pairs))


def _pairs(received: Sequence[Tensor], batch: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for first in received:
        for second in batch:
            is_pair = first.ndim > 1 and first.shape == second.shape and len(first) > 1 and first.numel() > 0
            if is_pair and not first.is_complex() and not second.is_complex():
                pairs.append((first, second.to(first.device)))
    return pairs


def _distinct_rows(pair: tuple[Tensor, Tensor]) -> int:
    """Return the number of distinct rows in the batch's tensor, estimated from some of the entries."""
    return len(torch.unique(some_entries(pair[1]), dim=0))


def order_of_equal_rows(received: Tensor, batch: Tensor) -> Tensor | None:
    """Return the permutation that turns the rows of the batch into those received, or ``None``.

    Args:
        received: ``(N, ...)``.
        batch: The rows in their original order, of the same shape.
    """
    if received.dtype != batch.dtype:
        return None
    first, second = some_entries(received), some_entries(batch)
    weights = torch.linspace(1.0, 2.0, first.shape[1], dtype=first.dtype, device=first.device).sqrt()
    ranks, rows = (first * weights).sum(1).argsort(stable=True), (second * weights).sum(1).argsort(stable=True)
    order = torch.empty_like(ranks)
    order[ranks] = rows
    return order if torch.equal(first, second[order]) and torch.equal(received, batch[order]) else None


def order_of_part(received: Sequence[Tensor], batch: Sequence[Tensor]) -> Tensor | None:
    """Return the position in the batch of each sample if the model received some of its samples, unchanged; otherwise ``None``.

    Args:
        received: The tensors that the model received, one row per sample.
        batch: The tensors of the batch.

    Example:
        >>> x = torch.tensor([[1.0, 5.0], [2.0, 4.0], [3.0, 6.0]])
        >>> order_of_part([x[x[:, 0] > 1]], [x])
        tensor([1, 2])
    """
    for first in received:
        for second in batch:
            is_pair = first.ndim > 1 and first.shape[1:] == second.shape[1:] and 0 < len(first) < len(second)
            if is_pair and first.numel() and first.dtype == second.dtype and not first.is_complex():
                order = _rows_in(first, second.to(first.device))
                if order is not None:
                    return order
    return None


def _rows_in(part: Tensor, batch: Tensor) -> Tensor | None:
    """Return the number of the row of the batch that each row of a part of it is; ``None`` if that is ambiguous."""
    entries = torch.cat([some_entries(batch), some_entries(part)])
    found, numbers = torch.unique(entries, dim=0, return_inverse=True)
    if len(found) != len(batch):  # rows of the batch are equal, or others are not in it
        return None
    places = torch.empty_like(numbers[: len(batch)])
    places[numbers[: len(batch)]] = torch.arange(len(batch), device=numbers.device)
    order = places[numbers[len(batch) :]]
    return order if torch.equal(part, batch[order]) else None


def _order_of_all(received: Sequence[Tensor], batch: Sequence[Tensor], order: Tensor | None) -> Tensor | None:
    """Return the order in which all tensors agree, as one of them may have equal rows; otherwise the given order."""
    matches = []
    for first in received:
        second = _match(first, batch)
        if second is not None:
            matches.append((first, second))
    if len(matches) < 2 or all(torch.equal(first, second) for first, second in matches):
        return order
    passed = torch.cat([some_entries(first) for first, _ in matches], 1)
    in_batch = torch.cat([some_entries(second) for _, second in matches], 1)
    common = order_of_equal_rows(passed, in_batch)
    return order if common is None else common


def _match(first: Tensor, batch: Sequence[Tensor]) -> Tensor | None:
    """Return the tensor of the batch that has the same rows, in the same or in a different order."""
    reordered = None
    for second in batch:
        if not first.ndim or not first.numel() or first.shape != second.shape or first.dtype != second.dtype:
            continue
        moved = second.to(first.device)
        if torch.equal(first, moved):
            return moved
        if reordered is None and not first.is_complex() and order_of_equal_rows(first, moved) is not None:
            reordered = moved
    return reordered


def _bits_of_other_order(received: Tensor, batch: Tensor) -> float:
    """Return the information in the summaries if they agree on one order that differs from the batch's.

    An increasing function of a feature or of a channel keeps the order of its values, and a decreasing one reverses it.
    """
    first, second = summaries(received), summaries(batch)
    ranks, rows = first.argsort(0), second.argsort(0)
    is_strict = (first.gather(0, ranks).diff(dim=0) > 0).all(0) & (second.gather(0, rows).diff(dim=0) > 0).all(0)
    orders = torch.empty_like(ranks).scatter_(0, ranks, rows)[:, is_strict]
    same = torch.arange(len(orders), device=orders.device)
    is_common = orders.shape[1] > 1 and torch.equal(orders, orders[:, :1].expand_as(orders))
    if not is_common or torch.equal(orders[:, 0], same) or torch.equal(ranks, rows.flip(0)):
        return 0.0
    different = torch.unique(rows[:, is_strict], dim=1)  # features with the same order add no evidence
    return float((different.shape[1] - 1) * math.lgamma(len(orders) + 1) / math.log(2))


def is_partly_equal(passed: Sequence[Tensor], given: Sequence[Tensor], sizes: list[int]) -> bool:
    """Return whether some of several calls received the rows of the batch unchanged and in order, and others did not.

    Args:
        passed: The tensors that the calls received, joined.
        given: The tensors of the batch.
        sizes: The number of rows of each call.
    """
    for first in passed:
        for second in given:
            if first.ndim < 2 or first.shape != second.shape or len(first) != sum(sizes):
                continue
            rows = list(sizes)
            parts = zip(torch.split(first, rows), torch.split(second.to(first.device), rows), strict=True)
            count = sum(torch.equal(*pair) for pair in parts)
            if 0 < count < len(sizes):
                return True
    return False


def some_entries(values: Tensor) -> Tensor:
    """Return some entries of each sample ``(N, K)``.

    Args:
        values: ``(N, ...)``.
    """
    flat = values.reshape(len(values), -1)
    return _wide(flat[:, :: math.ceil(flat.shape[1] / (4 * COLUMNS))])


def summaries(values: Tensor) -> Tensor:
    """Return features, or means over parts of the channels, of each sample ``(N, K)``.

    Args:
        values: ``(N, ...)`` with at least two axes.
    """
    if values.ndim == 2:
        return _wide(values[:, :: math.ceil(values.shape[1] / COLUMNS)])
    channels = _wide(values.flatten(2))
    return nn.functional.adaptive_avg_pool1d(channels, min(4, channels.shape[2])).flatten(1)[:, :COLUMNS]


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.device.type == "mps" else values.double()
