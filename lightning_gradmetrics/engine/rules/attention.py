"""Attention with a learned bias, expressed as products, a sum and a softmax, and self-attention with fewer copies."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradmetrics.engine.tracing.calls import DECOMPOSED, opened

__all__ = ["attention", "multi_head_attention"]

ARGUMENTS = 13
"""The number of arguments of multi-head attention that torch's module passes by position."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(q k^T scale + mask) v``, with the arguments of :func:`torch.nn.functional.scaled_dot_product_attention`.

    Without a learned mask the fused function runs, which has no parameters.
    """
    if attn_mask is None or not (attn_mask.requires_grad or isinstance(attn_mask, nn.Parameter)):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(times, -3)
        value = value.repeat_interleave(times, -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    weights = torch.softmax(query @ key.mT * factor + attn_mask, -1)
    return F.dropout(weights, dropout_p) @ value


def multi_head_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Return self-attention, with the arguments and the result of :func:`torch.nn.functional.multi_head_attention_forward`.

    Torch moves the samples to the second axis, which copies the input, its projection and the output, and adds the gradients of
    queries, keys and values as three tensors of the size of all. With the samples first, none of that is necessary.
    """
    if len(args) == ARGUMENTS and _is_plain(*args, **kwargs):
        query, _, _, _, heads, in_weight, in_bias, _, _, _, _, out_weight, out_bias = args
        attended = _self_attention(query.transpose(0, 1), heads, in_weight, in_bias, out_weight, out_bias)
        return attended.transpose(0, 1), None
    result: tuple[Tensor, Tensor | None] = opened(F.multi_head_attention_forward)(*args, **kwargs)
    return result


def _is_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    heads: int,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    training: bool = True,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    **others: Any,
) -> bool:
    """Return whether a layer attends from an input to itself without masks and random numbers, with the samples first in memory."""
    attends_to_itself = query is key is value and in_weight is not None
    if not attends_to_itself or need_weights or (training and dropout > 0):
        return False
    if any((bias_k is not None, bias_v is not None, add_zero_attn)) or any(map(_is_given, others.values())):
        return False
    has_sizes = query.ndim == 3 and query.shape[2] == width and width % heads == 0
    return has_sizes and query.stride() == (width, width * len(query), 1)


def _is_given(argument: Any) -> bool:
    """Return whether an optional argument has another value than ``None`` or ``False``."""
    return argument is not None and argument is not False


def _self_attention(
    x: Tensor, heads: int, in_weight: Tensor, in_bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None
) -> Tensor:
    """Return the attention of ``x (N, L, E)`` to itself, ``(N, L, E)``."""
    projected = F.linear(x, in_weight, in_bias).reshape(*x.shape[:2], 3, heads, -1)
    query, key, value = projected.unbind(2)  # the backward pass joins their gradients in one copy
    attended = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return F.linear(attended.transpose(1, 2).flatten(2), out_weight, out_bias)


DECOMPOSED[F.scaled_dot_product_attention] = attention
DECOMPOSED[F.multi_head_attention_forward] = multi_head_attention
