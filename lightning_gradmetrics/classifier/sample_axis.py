"""Moves the sample axis of inputs to the front, and back inside the model's forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import Inputs, map_tensors, tensors_in
from lightning_gradmetrics.classifier.preservation import preserved

__all__ = ["SampleAxis", "samples_first"]

SampleAxis = int | Mapping[Any, int]
"""The axis of the samples: one for all tensors, or a mapping from argument names or positions to axes."""


@contextmanager
def samples_first(model: nn.Module, inputs: Inputs, sample_axis: SampleAxis) -> Iterator[Inputs]:
    """Yield the inputs with the samples on the first axis; inside the block the model's forward moves them back.

    Args:
        model: The model; its ``forward`` is replaced inside the block.
        inputs: Its inputs.
        sample_axis: The axis of the samples; for arguments missing in a mapping it is the first axis.

    Raises:
        ValueError: If the inputs have no such axis or argument, or the numbers of samples differ.

    Example:
        >>> model = nn.GRU(3, 2)
        >>> with samples_first(model, torch.zeros(5, 4, 3), 1) as inputs:
        ...     inputs.shape, model(inputs)[0].shape
        (torch.Size([4, 5, 3]), torch.Size([5, 4, 2]))
    """
    axes = sample_axis.values() if isinstance(sample_axis, Mapping) else [sample_axis]
    if not all(type(axis) is int for axis in axes):
        raise TypeError(f"sample_axis={sample_axis!r}: expected an axis, or a mapping from arguments to axes")
    if sample_axis == 0 or sample_axis == {}:
        yield inputs
        return
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "sample_axis= is not available for a scripted model; call it in a module whose forward transposes"
        )
    if model._forward_pre_hooks:
        raise ValueError(
            "sample_axis= is not available for a model with forward pre-hooks, which would receive the samples on the first axis; "
            "call it in a module whose forward transposes"
        )
    moved = _moved(inputs, sample_axis)
    with preserved(model):  # restores the forward
        model.forward = partial(_forward_with_axes, model.forward, sample_axis)
        yield moved


def _forward_with_axes(forward: Callable[..., Any], sample_axis: SampleAxis, *args: Any, **kwargs: Any) -> Any:
    """Call a model's forward with the samples on their original axes."""
    placed = []
    for position, value in enumerate(args):
        placed.append(map_tensors(value, partial(_back, axis=_axis_of(sample_axis, position))))
    named = {}
    for name, value in kwargs.items():
        named[name] = map_tensors(value, partial(_back, axis=_axis_of(sample_axis, name)))
    return forward(*placed, **named)


def _back(tensor: Tensor, axis: int) -> Tensor:
    return tensor.movedim(0, axis) if axis else tensor


def _axis_of(sample_axis: SampleAxis, argument: Any) -> int:
    return sample_axis if isinstance(sample_axis, int) else sample_axis.get(argument, 0)


def _moved(inputs: Inputs, sample_axis: SampleAxis) -> Inputs:
    """Return the inputs with the samples on the first axis."""
    arguments = {0: inputs} if isinstance(inputs, Tensor) else inputs
    named = dict(arguments if isinstance(arguments, Mapping) else enumerate(arguments))
    if isinstance(sample_axis, Mapping) and not sample_axis.keys() <= named.keys():
        raise ValueError(f"sample_axis= names {list(sample_axis)}; the arguments in the inputs are {list(named)}")
    moved: dict[Any, Any] = {}
    sizes: dict[Any, int] = {}
    for argument, value in named.items():
        axis = _axis_of(sample_axis, argument)
        moved[argument] = map_tensors(value, partial(_first, axis=axis, argument=argument))
        for tensor in tensors_in(moved[argument]):
            if axis:
                sizes[argument] = len(tensor)
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the inputs have different numbers of samples on the axes of sample_axis=: {sizes}")
    if isinstance(inputs, Tensor):
        return moved[0]  # type: ignore[no-any-return]
    return moved if isinstance(inputs, Mapping) else tuple(moved.values())


def _first(tensor: Tensor, axis: int, argument: Any) -> Tensor:
    if not 0 <= axis < max(1, tensor.ndim):
        raise ValueError(
            f"the argument {argument!r} has shape {tuple(tensor.shape)} and no axis {axis}: allowed are 0 to {max(0, tensor.ndim - 1)}; "
            "pass a mapping from names or positions of arguments to axes as sample_axis= if arguments differ"
        )
    return tensor.movedim(axis, 0) if axis else tensor
