"""Finds the padding of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["padding_of", "without_padding"]


def padding_of(inputs: Any) -> Tensor | None:
    """Return which positions ``(N, T)`` of the inputs are padding, or ``None`` if there is no ``attention_mask`` of tokens.

    Raises:
        ValueError: If a text is padded on the left and the positions of its tokens are not given.
    """
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    padding = mask == 0
    starts_with_padding = bool((padding[:, :-1] & ~padding[:, 1:]).any())
    if starts_with_padding and inputs.get("position_ids") is None:
        raise ValueError(
            "attention_mask has padding in front of a token, and many models count positions from the padding: pad on the "
            "right, pass position_ids with the inputs, or use score_generation, which takes either side"
        )
    return padding


def without_padding(scores: Mapping[str, Tensor], padding: Tensor | None) -> dict[str, Tensor]:
    """Return the scores with NaN at padding, if they have one value per token ``(N, T)``."""
    cleaned = dict(scores)
    for name, values in scores.items():
        if padding is not None and values.shape == padding.shape:
            cleaned[name] = values.masked_fill(padding.to(values.device), torch.nan)
    return cleaned
