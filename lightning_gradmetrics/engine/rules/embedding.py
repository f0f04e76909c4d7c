"""Embeddings: looking up rows of a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.rules.base import Call, rule
from lightning_gradmetrics.engine.rules.sums import of_embedding
from lightning_gradmetrics.engine.uses import EmbeddingUse, Use

__all__ = ["embedding"]


def _plain(call: Call) -> bool:
    return call.axis == call.out and not call.get("scale_grad_by_freq", False)


def _every_axis(values: dict[str, Any]) -> int:
    return int(values["input"].ndim)


@rule(
    torch.embedding,
    arguments="weight input padding_idx scale_grad_by_freq sparse",
    weights="weight",
    accepts=_plain,
    row_axes=_every_axis,
    sums=of_embedding,
)
def embedding(call: Call, g: Tensor) -> Iterator[tuple[str, Use]]:
    """``y_t = W[i_t]``: each row's gradient is the sum of ``g_t`` where it was looked up."""
    indices, padding = call.x, call.get("padding_idx", -1)
    shape = call.shape("weight")
    g = g.reshape(g.shape[0], indices.shape[1:].numel(), g.shape[-1])
    yield "weight", EmbeddingUse(indices.flatten(1), g, shape, None if padding < 0 else padding)
