"""Moves the sample axis of inputs to the front, and back inside the model's forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import Inputs, tensors_in
from lightning_gradmetrics.classifier.preservation import preserved

__all__ = ["SampleAxis", "TensorAxis", "check_sample_axis", "samples_first", "tensor_axes", "tensors_with_samples"]

SampleAxis = int | Mapping[Any, int | None]
"""The axis of the samples: one for all tensors; or a mapping from arguments, by name or position, to axes, with ``None`` for
an argument that all samples share. A name may also be that of an entry of a mapping among the arguments."""

_ALLOWED = (
    "expected an axis from 0 on, or a mapping from arguments to axes, with None for an argument that all samples share, as in "
    "{'x': 1, 'table': None}"
)


def check_sample_axis(sample_axis: Any) -> SampleAxis:
    """Return the argument ``sample_axis``, checked.

    Raises:
        TypeError: If it is neither an axis nor a mapping from arguments to axes.
        ValueError: If an axis is negative.

    Example:
        >>> check_sample_axis({"x": 1, "table": None})
        {'x': 1, 'table': None}
    """
    is_mapping = isinstance(sample_axis, Mapping)
    for key, axis in sample_axis.items() if is_mapping else [(0, sample_axis)]:
        is_none = is_mapping and axis is None
        if type(key) not in (int, str) or not (is_none or type(axis) is int):
            raise TypeError(f"sample_axis={sample_axis!r}: {_ALLOWED}")
        if not is_none and axis < 0:
            raise ValueError(f"sample_axis={sample_axis!r}: {_ALLOWED}")
    return sample_axis  # type: ignore[no-any-return]


@dataclass(frozen=True)
class TensorAxis:
    """What is stated about one tensor of the inputs.

    Args:
        argument: The name or position of its argument, or its name in a mapping.
        axis: The axis of its samples; ``None`` if all samples share it.
        is_stated: Whether the user has stated that.
    """

    argument: Any
    axis: int | None = 0
    is_stated: bool = False


@dataclass(frozen=True)
class _Axes:
    """The axes by argument.

    Args:
        arguments: For each key of the inputs, the name and the axis.
        entries: The axes of entries of mappings among the arguments.
    """

    arguments: dict[Any, TensorAxis]
    entries: Mapping[Any, int | None] = field(default_factory=dict)

    def mapped(self, values: Mapping[Any, Any], function: Callable[[Tensor, TensorAxis], Any]) -> dict[Any, Any]:
        """Return arguments with a function applied to each tensor and its axis."""
        mapped = {}
        for key, value in values.items():
            mapped[key] = self._mapped(value, self.arguments.get(key, TensorAxis(key)), function)
        return mapped

    def _mapped(self, value: Any, axis: TensorAxis, function: Callable[[Tensor, TensorAxis], Any]) -> Any:
        if isinstance(value, Tensor):
            return function(value, axis)
        if isinstance(value, Mapping):
            entries = {}
            for key, entry in value.items():
                entries[key] = self._mapped(entry, self._of_entry(key, axis), function)
            return entries
        if not isinstance(value, (list, tuple)):
            return value
        values = [self._mapped(entry, axis, function) for entry in value]
        if isinstance(value, list):
            return values
        return type(value)(*values) if hasattr(value, "_fields") else tuple(values)

    def _of_entry(self, key: Any, outer: TensorAxis) -> TensorAxis:
        if not isinstance(key, str):  # a number is the position of an argument
            return outer
        if key in self.entries:
            return TensorAxis(key, self.entries[key], is_stated=True)
        return TensorAxis(key, outer.axis, outer.is_stated)


Placed = tuple[Inputs, Mapping[Any, int | None]]


def samples_first(model: nn.Module, inputs: Inputs, sample_axis: SampleAxis) -> AbstractContextManager[Placed]:
    """Return a block that gets the inputs with the samples on the first axis; inside, the model's forward moves them back.

    Args:
        model: The model; its ``forward`` is replaced inside the block.
        inputs: Its inputs.
        sample_axis: The axis of the samples; for arguments missing in a mapping it is the first axis.

    Returns:
        The block. It gets the inputs, which are the same object if nothing is moved, and what ``sample_axis`` states about them: 0 for
        arguments with samples, ``None`` for those that all samples share.

    Raises:
        ValueError: If the inputs have no such axis or argument, or the numbers of samples differ.

    Example:
        >>> model = nn.GRU(3, 2)
        >>> with samples_first(model, torch.zeros(5, 4, 3), 1) as (inputs, stated):
        ...     inputs.shape, model(inputs)[0].shape, stated
        (torch.Size([4, 5, 3]), torch.Size([5, 4, 2]), {})
    """
    check_sample_axis(sample_axis)
    return _samples_first(model, inputs, sample_axis) if sample_axis else nullcontext((inputs, {}))


@contextmanager
def _samples_first(model: nn.Module, inputs: Inputs, sample_axis: SampleAxis) -> Iterator[Placed]:
    axes = _axes(model, inputs, sample_axis)
    moved, stated = _moved(inputs, axes), _stated(axes)
    is_moved = any(bool(argument.axis) for argument in _listed(inputs, axes))
    if not is_moved:
        yield inputs, stated
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
    with preserved(model):  # restores the forward
        forward: Any = partial(_forward_with_axes, model.forward, axes)
        forward.__signature__ = _signature(model)
        model.forward = forward
        yield moved, stated


def tensor_axes(model: nn.Module, inputs: Inputs, sample_axis: SampleAxis) -> list[TensorAxis]:
    """Return the argument of each tensor of the inputs, and what is stated about its axis.

    Example:
        >>> [axis.argument for axis in tensor_axes(nn.Bilinear(2, 2, 3), (torch.zeros(4, 2), torch.zeros(4, 2)), 0)]
        ['input1', 'input2']
    """
    return _listed(inputs, _axes(model, inputs, sample_axis))


def tensors_with_samples(model: nn.Module, inputs: Inputs, sample_axis: SampleAxis) -> list[Tensor]:
    """Return the tensors of the inputs except those of which it is stated that all samples share them."""
    if not sample_axis:  # nothing is stated
        return list(tensors_in(inputs))
    tensors = []
    for tensor, axis in zip(tensors_in(inputs), tensor_axes(model, inputs, sample_axis), strict=True):
        if axis.axis is not None:
            tensors.append(tensor)
    return tensors


def _listed(inputs: Inputs, axes: _Axes) -> list[TensorAxis]:
    listed: list[TensorAxis] = []
    axes.mapped(_named(inputs), lambda tensor, axis: listed.append(axis))
    return listed


def _named(inputs: Inputs) -> dict[Any, Any]:
    """Return the arguments by name or position."""
    arguments = {0: inputs} if isinstance(inputs, Tensor) else inputs
    return dict(arguments if isinstance(arguments, Mapping) else enumerate(arguments))


def _signature(model: nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None


def _parameter_names(model: nn.Module) -> list[str]:
    """Return the names of the positional parameters of the model's forward, as far as they are known."""
    names, signature = [], _signature(model)
    for parameter in signature.parameters.values() if signature is not None else ():
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            break
        names.append(parameter.name)
    return names


def _axes(model: nn.Module, inputs: Inputs, sample_axis: SampleAxis) -> _Axes:
    """Return the axis of each argument, found by its name or by its position.

    Raises:
        ValueError: If a name or a position is that of no argument.
    """
    named, parameters = _named(inputs), _parameter_names(model)
    stated = sample_axis if isinstance(sample_axis, Mapping) else {}
    default = 0 if isinstance(sample_axis, Mapping) else sample_axis
    arguments, used = {}, set()
    for key in named:
        name = parameters[key] if isinstance(key, int) and key < len(parameters) else key
        position = parameters.index(key) if key in parameters else key
        arguments[key] = TensorAxis(name, default)
        for alias in (key, name, position):
            if alias in stated:
                arguments[key] = TensorAxis(name, stated[alias], is_stated=True)
                used.add(alias)
    entries = dict(stated)
    unknown = stated.keys() - used - _entry_names(list(named.values()))
    if unknown:
        raise ValueError(f"sample_axis= names {list(stated)}; the arguments in the inputs are {list(named)}")
    return _Axes(arguments, entries)


def _entry_names(values: Sequence[Any]) -> set[Any]:
    """Return the keys of all mappings in some values."""
    names: set[Any] = set()
    for value in values:
        if isinstance(value, Mapping):
            names |= value.keys()
            names |= _entry_names(list(value.values()))
        elif isinstance(value, (list, tuple)):
            names |= _entry_names(value)
    return names


def _stated(axes: _Axes) -> dict[Any, int | None]:
    """Return what is stated about inputs whose samples are on the first axis."""
    stated: dict[Any, int | None] = {}
    for key, axis in axes.entries.items():
        if isinstance(key, str):
            stated[key] = None if axis is None else 0
    for key, argument in axes.arguments.items():
        stated.pop(argument.argument, None)
        if argument.is_stated:
            stated[key] = None if argument.axis is None else 0
    return stated


def _forward_with_axes(forward: Callable[..., Any], axes: _Axes, *args: Any, **kwargs: Any) -> Any:
    """Call a model's forward with the samples on their original axes."""
    placed, named = axes.mapped(dict(enumerate(args)), _back), axes.mapped(kwargs, _back)
    return forward(*placed.values(), **named)


def _back(tensor: Tensor, axis: TensorAxis) -> Tensor:
    return tensor.movedim(0, axis.axis) if axis.axis else tensor


def _moved(inputs: Inputs, axes: _Axes) -> Inputs:
    """Return the inputs with the samples on the first axis."""
    sizes: dict[Any, int] = {}

    def first(tensor: Tensor, axis: TensorAxis) -> Tensor:
        moved = _first(tensor, axis)
        if axis.axis or (axis.is_stated and axis.axis is not None):
            sizes[axis.argument] = len(moved)
        return moved

    moved = axes.mapped(_named(inputs), first)
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the inputs have different numbers of samples on the axes of sample_axis=: {sizes}")
    if isinstance(inputs, Tensor):
        return moved[0]  # type: ignore[no-any-return]
    return moved if isinstance(inputs, Mapping) else tuple(moved.values())


def _first(tensor: Tensor, axis: TensorAxis) -> Tensor:
    if axis.axis is None or (axis.axis == 0 and not axis.is_stated):
        return tensor
    if axis.axis >= max(1, tensor.ndim) or not tensor.ndim:
        raise ValueError(
            f"the argument {axis.argument!r} has shape {tuple(tensor.shape)} and no axis {axis.axis}: allowed are 0 to "
            f"{max(0, tensor.ndim - 1)}; pass a mapping from names or positions of arguments to axes as sample_axis= if arguments "
            "differ"
        )
    return tensor.movedim(axis.axis, 0) if axis.axis else tensor
