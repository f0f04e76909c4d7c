"""Bags of embeddings, expressed as an embedding, which has a rule, and a reduction over the bag."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_gradmetrics.engine.tracing.calls import DECOMPOSED, opened

__all__ = ["embedding_bag"]


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Bags of equal size ``(N, T)``, with the arguments and the result of :func:`torch.nn.functional.embedding_bag`.

    Bags with offsets and gradients scaled by frequency go to the fused function, because their rows belong to no
    sample.
    """
    if input.ndim != 2 or offsets is not None or scale_grad_by_freq:
        fused: Any = opened(F.embedding_bag)
        arguments = (input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse)
        result: Tensor = fused(*arguments, per_sample_weights, include_last_offset, padding_idx)
        return result
    rows = F.embedding(input, weight, padding_idx, max_norm, norm_type)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    left_out = None if padding_idx is None else (input == padding_idx % len(weight)).unsqueeze(-1)
    return _reduced(rows, left_out, mode)


def _reduced(rows: Tensor, left_out: Tensor | None, mode: str) -> Tensor:
    """Reduce ``(N, T, D)`` over the bag without the padding, to ``(N, D)``; an empty bag gives zero."""
    if mode == "max":
        return _largest(rows, left_out)
    if left_out is None:
        return rows.mean(1) if mode == "mean" and rows.shape[1] else rows.sum(1)
    total = rows.masked_fill(left_out, 0).sum(1)
    if mode == "sum":
        return total
    return total / (~left_out).sum(1).clamp(min=1)


def _largest(rows: Tensor, left_out: Tensor | None) -> Tensor:
    if not rows.shape[1]:
        return rows.sum(1)
    if left_out is None:
        return rows.max(1).values
    largest = rows.masked_fill(left_out, -torch.inf).max(1).values
    return largest.masked_fill(left_out.all(1), 0)


DECOMPOSED[F.embedding_bag] = embedding_bag
