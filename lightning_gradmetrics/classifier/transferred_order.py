"""Determines whether a hook of the user moved the rows of a batch, from copies of some of their values."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradmetrics.classifier.row_order import RowOrder, order_of_equal_rows, some_entries, summaries

__all__ = ["RowMarks", "row_marks", "transferred_order"]


@dataclass(frozen=True)
class RowMarks:
    """Copies of values that identify the rows of a tensor.

    Args:
        shape: The shape of the tensor ``(N, ...)``.
        entries: Some entries of each row ``(N, K)``; if these are equal in several rows, a hash of each row ``(N, 1)``.
        means: Features, or means over parts of the channels, of each row ``(N, K)``; ``None`` for one number per row.
    """

    shape: tuple[int, ...]
    entries: Tensor
    means: Tensor | None


def row_marks(tensors: Iterable[Tensor]) -> list[RowMarks]:
    """Return the marks of the tensors that have rows of real numbers.

    Args:
        tensors: The tensors of a batch.
    """
    marks = []
    for tensor in tensors:
        is_dense = not tensor.is_nested and tensor.layout == torch.strided
        if not is_dense or tensor.ndim == 0 or tensor.numel() == 0 or tensor.is_complex():
            continue
        values = tensor.detach()
        means = _copied(summaries(values)) if values.ndim > 1 else None
        entries = _copied(some_entries(values))
        if entries.shape[1] < values[0].numel() and len(torch.unique(entries, dim=0)) < len(entries):
            entries = _hashes(values)
        marks.append(RowMarks(tuple(values.shape), entries, means))
    return marks


def _hashes(values: Tensor) -> Tensor:
    """Return a number for each row ``(N, 1)`` that depends on all of its values."""
    hashes = []
    for row in values.reshape(len(values), -1).cpu():
        exact = row.double().nan_to_num() + 0.0  # -0.0 becomes 0.0
        digest = hashlib.blake2b(exact.numpy().tobytes(), digest_size=6).digest()
        hashes.append([float(int.from_bytes(digest, "big"))])
    return torch.tensor(hashes, dtype=torch.float64)


def _copied(values: Tensor) -> Tensor:
    return values.cpu().clone().nan_to_num()


def transferred_order(before: Sequence[RowMarks], after: Sequence[RowMarks], size: int) -> RowOrder | None:
    """Return the order of the rows after a change of the batch, or ``None`` if it is unknown.

    Args:
        before: The marks of the batch before the change.
        after: The marks of the batch after it.
        size: The number of samples ``N``; tensors of another length are ignored.

    Returns:
        If the rows moved, the earlier position of each row; otherwise the evidence, in bits, that they did not move:
        infinite if this is certain.

    Example:
        >>> x = torch.tensor([[1.0, 5.0], [2.0, 4.0], [3.0, 6.0]])
        >>> transferred_order(row_marks([x]), row_marks([x[[2, 0, 1]]]), 3)
        RowOrder(order=tensor([2, 0, 1]), bits=0.0)
        >>> transferred_order(row_marks([x]), row_marks([x]), 3)
        RowOrder(order=None, bits=inf)
    """
    if size == 1:
        return RowOrder(bits=math.inf)
    pairs, changed, others = _pairs_of_equal_rows(_of_length(before, size), _of_length(after, size))
    bits = 0.0
    if pairs:
        has_inputs = any(marks.means is not None for marks, _ in pairs)
        same = _order_of_pairs(pairs, is_all=has_inputs and not others)
        if same is None or same.order is not None:
            return same
        bits = same.bits
    bits += _bits_of_means(changed, others)
    return RowOrder(bits=bits) if bits else None


def _of_length(marks: Sequence[RowMarks], size: int) -> list[RowMarks]:
    """Return the marks of tensors with this number of rows."""
    matching = []
    for mark in marks:
        if mark.shape[0] == size:
            matching.append(mark)
    return matching


def _pairs_of_equal_rows(
    left: list[RowMarks], after: Sequence[RowMarks]
) -> tuple[list[tuple[RowMarks, RowMarks]], list[RowMarks], list[RowMarks]]:
    """Return the pairs of marks with equal rows in any order, and the marks before and after the change without a partner."""
    pairs: list[tuple[RowMarks, RowMarks]] = []
    others = []
    for marks in after:
        number = _partner(marks, left)
        if number is None:
            others.append(marks)
        else:
            pairs.append((left.pop(number), marks))
    return pairs, left, others


def _partner(marks: RowMarks, candidates: Sequence[RowMarks]) -> int | None:
    """Return the number of the candidate with the same rows, if possible in the same order."""
    moved = None
    for number, candidate in enumerate(candidates):
        if candidate.shape != marks.shape or candidate.entries.shape != marks.entries.shape:
            continue
        if torch.equal(candidate.entries, marks.entries):
            return number
        if moved is None and order_of_equal_rows(marks.entries, candidate.entries) is not None:
            moved = number
    return moved


def _order_of_pairs(pairs: Sequence[tuple[RowMarks, RowMarks]], is_all: bool) -> RowOrder | None:
    """Return the order in which all pairs agree, or ``None`` if there is none or another one is possible too.

    Args:
        pairs: Marks with equal rows, before and after.
        is_all: Whether the pairs contain every tensor, so that equal rows belong to equal samples.
    """
    in_batch = torch.cat([first.entries for first, _ in pairs], 1)
    passed = torch.cat([second.entries for _, second in pairs], 1)
    order = order_of_equal_rows(passed, in_batch)
    if order is None:
        return None
    counts = torch.unique(in_batch, dim=0, return_counts=True)[1]
    is_certain = is_all or int(counts.max()) == 1
    if not torch.equal(order, torch.arange(len(order))):
        return RowOrder(order) if is_certain else None
    arrangements = torch.lgamma(counts.double() + 1).sum()
    bits = (math.lgamma(len(order) + 1) - float(arrangements)) / math.log(2)
    return RowOrder(bits=math.inf if is_certain else bits)


def _bits_of_means(before: Sequence[RowMarks], after: Sequence[RowMarks]) -> float:
    """Return the largest evidence, in bits, that a change of values kept the order of the rows."""
    bits = 0.0
    for first in before:
        for second in after:
            if first.means is not None and second.means is not None and first.means.shape == second.means.shape:
                bits = max(bits, _bits_of_same_order(first.means, second.means))
    return bits


def _bits_of_same_order(before: Tensor, after: Tensor) -> float:
    """Return the information in the columns if each of them orders the rows as it did before; otherwise 0."""
    ranks, rows = after.argsort(0), before.argsort(0)
    is_strict = (after.gather(0, ranks).diff(dim=0) > 0).all(0) & (before.gather(0, rows).diff(dim=0) > 0).all(0)
    if not bool(is_strict.any()) or not torch.equal(ranks[:, is_strict], rows[:, is_strict]):
        return 0.0
    different = torch.unique(rows[:, is_strict], dim=1)  # features with the same order add no evidence
    bits: float = different.shape[1] * math.lgamma(len(rows) + 1) / math.log(2)
    return bits
