"""Shuffles the channels of images in the channels-last layout.

``x.view(N, G, C // G, H, W).transpose(1, 2).contiguous().view(N, C, H, W)`` shuffles channels, as in ShuffleNet. The copy in it is
contiguous, so the convolutions after it would run in that layout, in which they take longer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.tracing.trace import CallTrace, TracedCall

__all__ = ["STRIDED", "shuffled_images", "shuffles_channels"]

STRIDED = (torch.as_strided, torch.as_strided_, Tensor.as_strided, Tensor.as_strided_)
"""Functions whose results depend on the layout of their input."""

_VIEWS = (Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten)


def shuffles_channels(trace: CallTrace) -> bool:
    """Return whether there are shuffles of channels, and no other contiguous copies of tensors with five axes.

    The copy of a shuffle is used once, by a view that merges its second and its third axis.

    Args:
        trace: The calls of a forward pass.
    """
    uses: Counter[int] = Counter()
    for call in trace.calls:
        uses.update(state.serial for state in call.inputs)
    copies: dict[int, tuple[int, ...]] = {}
    merged: set[int] = set()
    for call in trace.calls:
        if _is_copy(call):
            copies[call.outputs[0].serial] = call.outputs[0].shape
        shape = copies.get(call.inputs[0].serial) if call.inputs else None
        if shape is not None and call.function in _VIEWS and _merges(shape, call.outputs[0].shape):
            merged.add(call.inputs[0].serial)
    return bool(copies) and merged == copies.keys() and all(uses[serial] == 1 for serial in merged)


def _is_copy(call: TracedCall) -> bool:
    return call.function is Tensor.contiguous and call.args[0].ndim == 5 and call.result is not call.args[0]


def _merges(shape: tuple[int, ...], merged: tuple[int, ...]) -> bool:
    return merged == (shape[0], shape[1] * shape[2], *shape[3:])


class _Shuffle(torch.autograd.Function):
    """Shuffles the channels of ``(N, C, H, W)``, so that those of the groups alternate; the gradient is dense as well.

    Otherwise the gradient would be a view whose channels are not adjacent, on which the backward pass of a ReLU takes 20 times as long.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, groups: int) -> Tensor:
        ctx.others = images.shape[1] // groups
        return torch.native_channel_shuffle(images, groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        return torch.native_channel_shuffle(gradient, ctx.others), None


def shuffled_images(function: Any, args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the copy in a shuffle, such that merging its second and its third axis gives images in the channels-last layout.

    Args:
        function: The function of a call.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The copy; ``None`` for other calls, and for images in another layout.
    """
    if function is not Tensor.contiguous or len(args) != 1 or kwargs or not _is_transposed_image(args[0]):
        return None
    x: Tensor = args[0]
    images = x.transpose(1, 2).flatten(1, 2)
    shuffled: Tensor = _Shuffle.apply(images, x.shape[2])  # type: ignore[no-untyped-call]
    return shuffled.unflatten(1, x.shape[1:3])  # type: ignore[no-untyped-call, no-any-return]


def _is_transposed_image(x: Tensor) -> bool:
    """Return whether a tensor is ``(N, C // G, G, H, W)``, of images in the channels-last layout whose groups of channels are adjacent."""
    if x.ndim != 5 or x.dtype not in (torch.float32, torch.float64) or x.is_contiguous():
        return False
    return x.permute(0, 3, 4, 2, 1).is_contiguous()
