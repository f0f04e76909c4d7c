"""Finds the class axis of logits with positions, from the layers and the inputs; it is never guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_gradmetrics.classifier.head import LayerCall
from lightning_gradmetrics.classifier.patches import CONVOLUTIONS, TRANSPOSED

__all__ = ["class_axis", "classes_second"]


def class_axis(logits: Tensor, model: nn.Module, calls: Sequence[LayerCall], inputs: Any, is_default: bool) -> int:
    """Return the class axis of logits with positions: 1, or -1 for the last one.

    ``(N, C, H, W)`` has its classes on axis 1, as a convolution returns them. The last axis is taken if a linear layer
    over the last axis returned a tensor of that shape and no convolution did, or if the inputs are ``input_ids`` of the
    shape ``(N, T)`` of the other two axes.

    Args:
        logits: What the model returned, with three axes or more.
        model: The model.
        calls: The calls of its layers.
        inputs: The inputs of its call.
        is_default: Whether the logits were found automatically; a user's ``logits_fn`` must return the classes on axis
            1.

    Raises:
        ValueError: If the axis is ambiguous.

    Example:
        >>> import torch
        >>> class_axis(torch.zeros(2, 3, 8, 8), nn.Identity(), [], None, True)
        1
    """
    convolved, linear = _layers_of_shape(logits, model, calls)
    if linear and not convolved:
        return -1
    if convolved and not linear:
        return 1
    if logits.ndim == 3 and _is_language(inputs, tuple(logits.shape[:2])):  # type: ignore[arg-type]
        return -1
    if (logits.ndim > 3 and not linear) or not is_default:
        return 1
    raise ValueError(
        f"the logits have shape {tuple(logits.shape)}, and it is ambiguous which axis holds the classes: no layer returned "
        "them. Pass logits_fn=, a callable from the model's output to logits (N, C) of samples, or (N, C, ...) of positions, "
        "with the classes on axis 1; for one logit per pixel, lambda z: z.unsqueeze(1)"
    )


def _layers_of_shape(logits: Tensor, model: nn.Module, calls: Sequence[LayerCall]) -> tuple[bool, bool]:
    """Return whether a convolution, and whether a linear layer, returned a tensor of the logits' shape."""
    layers, shape = dict(model.named_modules()), tuple(logits.shape)
    convolved = linear = False
    for call in calls:
        if call.output_shape == shape:
            convolved = convolved or isinstance(layers.get(call.name), (*CONVOLUTIONS, *TRANSPOSED))
            linear = linear or isinstance(layers.get(call.name), nn.Linear)
    return convolved, linear


def _is_language(inputs: Any, shape: tuple[int, int]) -> bool:
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    return isinstance(ids, Tensor) and not ids.is_floating_point() and tuple(ids.shape) == shape


def classes_second(logits: Tensor, axis: int) -> Tensor:
    """Return the logits with the classes on axis 1."""
    return logits if axis == 1 else logits.movedim(axis, 1)
