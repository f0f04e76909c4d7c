"""Finds calls on a large path that may write their result into the memory of an earlier one.

A ReLU after a norm, and the sum of a shortcut and a layer's output, read a tensor that nothing else uses. If their results are written
in place, a batch needs less memory, and has fewer page faults.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_gradmetrics.engine.passes.known_calls import KnownCall

__all__ = ["SUMS", "in_place"]

_RELUS = (F.relu, torch.relu, Tensor.relu)

SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
"""Sums of two tensors."""

_LAYERS = (torch.conv1d, torch.conv2d, torch.conv3d, torch.batch_norm, torch.group_norm, F.linear)
"""Layers whose results are new tensors that their own backward passes do not read."""


def in_place(calls: Sequence[KnownCall], leaves: int, end: int, flags: Collection[int]) -> list[KnownCall]:
    """Return calls of which those are marked that write their result into the memory of an argument.

    The argument is the result of a layer or of a sum that is written in place, no other call uses it, and it is not the logits. It is not
    that of a ReLU, whose backward pass reads it.

    Args:
        calls: The calls.
        leaves: The number of leaves.
        end: The number of the result that is the logits.
        flags: The numbers of the constants that are ``False``.
    """
    uses = Counter(number for call in calls for number, _ in call.tensors)
    makers: dict[int, int] = {}
    marked = list(calls)
    made = leaves
    for place, call in enumerate(calls):
        for argument in _candidates(call, flags):
            number = call.numbers[argument]
            maker = makers.get(number)
            if maker is not None and number != end and uses[number] == 1 and _are_alike(call, calls[maker]):
                marked[maker] = replace(marked[maker], is_hidden=True)
                marked[place] = replace(call, in_place=argument)
                break
        is_sum_in_place = marked[place].in_place is not None and call.function in SUMS
        if call.made == 1 and call.has_gradients and (is_sum_in_place or _is_layer(call)):
            makers[made] = place
        made += call.made
    return marked


def _candidates(call: KnownCall, flags: Collection[int]) -> tuple[int, ...]:
    """Return the places of the arguments that a call could change in place."""
    if not call.has_gradients or call.has_sources:
        return ()
    if call.function in _RELUS and set(call.numbers[1:]) <= set(flags):
        return (0,)
    is_sum = call.function in SUMS and len(call.numbers) == 2 and not call.names and min(call.numbers) >= 0
    return (0, 1) if is_sum else ()


def _are_alike(call: KnownCall, other: KnownCall) -> bool:
    """Return whether the results of two calls have one type and shape."""
    return call.dtype is other.dtype is not None and call.shape == other.shape


def _is_layer(call: KnownCall) -> bool:
    """Return whether the result of a call is that of a layer, or of a norm whose convolution returns it."""
    held = call.inner[-1].held if call.inner else call.held
    return call.is_norm or (held is not None and held.norm is None and held.step.function in _LAYERS)
