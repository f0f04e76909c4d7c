"""Finds the padding of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_unmasked", "padding_of", "without_padding"]


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


def check_unmasked(model: nn.Module, ids: Tensor, labels: Tensor | None) -> None:
    """Refuse texts without a mask that begin with the padding id, or end with it where the label is not -100.

    Args:
        model: The model, whose configuration has the padding id; ids that also begin or end texts are not padding.
        ids: The token ids ``(N, T)``.
        labels: The labels ``(N, T)``, or ``None``.

    Raises:
        ValueError: If a text has padding that the model reads as its tokens, or that would be scored.
    """
    pad = _padding_id(model)
    if pad is None or not ids.numel():
        return
    ends = (ids[:, -1] == pad) if labels is None else (ids[:, -1] == pad) & (labels[:, -1].to(ids.device) >= 0)
    if bool((ids[:, 0] == pad).any() or ends.any()):
        raise ValueError(
            f"a text begins or ends with {pad}, the padding id of the model, and the batch has no attention_mask, so padding would "
            "count as text: put the attention_mask into the batch, or pad on the right with the label -100"
        )


def _padding_id(model: nn.Module) -> int | None:
    """Return the padding id of a model's configuration; ``None`` if it has none, or if the id also begins or ends texts."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        pad = getattr(config, "pad_token_id", None)
        if isinstance(pad, int):
            first, last = getattr(config, "bos_token_id", None), getattr(config, "eos_token_id", None)
            ends = last if isinstance(last, list) else [last]
            return None if pad in (first, *ends) else pad
    return None


def without_padding(scores: Mapping[str, Tensor], padding: Tensor | None) -> dict[str, Tensor]:
    """Return the scores with NaN at padding, if they have one value per token ``(N, T)``."""
    cleaned = dict(scores)
    for name, values in scores.items():
        if padding is not None and values.shape == padding.shape:
            cleaned[name] = values.masked_fill(padding.to(values.device), torch.nan)
    return cleaned
