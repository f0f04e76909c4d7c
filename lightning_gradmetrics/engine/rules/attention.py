"""Attention with a learned bias, expressed as products, a sum and a softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradmetrics.engine.calls import DECOMPOSED

__all__ = ["attention"]


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


DECOMPOSED[F.scaled_dot_product_attention] = attention
