"""Which axis of a layer's input and output holds the samples, found by passes with two and with three samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_gradmetrics.scoring.agreement import difference

__all__ = ["MixedRowsError", "find_sample_axes", "has_known_axes", "rows_of_input", "rows_of_output"]

ROUNDING_OF_LAYERS = 20
"""Allowed difference of values inside a model, in units of that of logits: rounding may switch units on or off."""


class MixedRowsError(ValueError):
    """The rows of a layer inside a model are not those of the samples in order."""


@dataclass(frozen=True)
class _Axes:
    """The axes of the samples in a layer's input and output.

    Args:
        of_input: The axis of the input; ``None`` for a layer that is not called with samples.
        of_output: The axis of the output.
        axes: The numbers of axes of the input and of the output; 0 if they are unknown.
        samples: How many different samples the axes were found with, at most 3.
    """

    of_input: int | None = 0
    of_output: int | None = 0
    axes: tuple[int, int] = (0, 0)
    samples: int = 0


_AXES: WeakKeyDictionary[nn.Module, _Axes] = WeakKeyDictionary()


def has_known_axes(layer: nn.Module, size: int = 1) -> bool:
    """Return whether the axes of a layer were found, in a batch as large as this one or with three samples."""
    known = _AXES.get(layer)
    return known is not None and known.samples >= min(size, 3)


def rows_of_input(layer: nn.Module, values: Tensor, size: int) -> Tensor | None:
    """Return a layer's input, or a gradient of it, with the samples first: ``(N, ...)``, or several consecutive rows per sample.

    Args:
        layer: The layer.
        values: The tensor.
        size: The number of samples ``N``.

    Returns:
        The tensor; ``None`` if it does not contain the samples, as a table of positions.

    Raises:
        MixedRowsError: If it is a nested tensor.
    """
    known = _AXES.get(layer, _Axes())
    return _with_samples_first(layer, values, known.of_input, known.axes[0], size)


def rows_of_output(layer: nn.Module, values: Tensor, size: int) -> Tensor | None:
    """Return a layer's output, or a gradient of it, with the samples first, as :func:`rows_of_input` does."""
    known = _AXES.get(layer, _Axes())
    return _with_samples_first(layer, values, known.of_output, known.axes[1], size)


def _with_samples_first(layer: nn.Module, values: Tensor, axis: int | None, axes: int, size: int) -> Tensor | None:
    """Return a tensor with the samples first; one sample alone may lack that axis, which ``squeeze()`` removes."""
    _refuse_nested(layer, values)
    if size == 1 and axis is not None and values.ndim == axes - 1:
        values = values.unsqueeze(axis)
    if axis is None or values.ndim <= axis or not values.shape[axis] or values.shape[axis] % size:
        return None
    return values.movedim(axis, 0)


class _Pass:
    """The first input and output of each layer in a forward pass."""

    def __init__(self) -> None:
        self.tensors: dict[nn.Module, list[Tensor | None]] = {}

    def see(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep a copy of the tensors: the model may change them in place."""
        if layer not in self.tensors:
            given = args[0] if args else next(iter(kwargs.values()), None)
            self.tensors[layer] = [_copied(given), _copied(output)]


def _copied(value: Any) -> Tensor | None:
    return value.detach().clone() if isinstance(value, Tensor) else None


def find_sample_axes(layers: Sequence[nn.Module], forward: Callable[[Sequence[int]], Any], size: int) -> None:
    """Find the axes of the samples in the inputs and outputs of layers, for :func:`rows_of_input`.

    The axis of the samples is the one that grows with their number. A tensor without such an axis does not depend on the samples.

    Args:
        layers: The layers.
        forward: Runs the model on the samples with these numbers.
        size: The number of samples in the batch.

    Raises:
        MixedRowsError: If the shape depends on the number of samples in another way, as for an expert of a mixture
            of experts, or if the first rows on it are not those of the first samples, as for windows before samples.
    """
    passes = []
    for count in (2, 3):
        seen = _Pass()
        with ExitStack() as stack:
            for layer in layers:
                stack.callback(layer.register_forward_hook(seen.see, with_kwargs=True).remove)
            forward([number % size for number in range(count)])
        passes.append(seen.tensors)
    for layer in layers:
        found = _Axes()
        if all(layer in tensors for tensors in passes):
            (input_of_two, output_of_two), (input_of_three, output_of_three) = (tensors[layer] for tensors in passes)
            axes = _number_of_axes(input_of_two), _number_of_axes(output_of_two)
            found = _Axes(
                _axis(layer, input_of_two, input_of_three), _axis(layer, output_of_two, output_of_three), axes
            )
        _AXES[layer] = replace(found, samples=min(size, 3))


def _axis(layer: nn.Module, two: Tensor | None, three: Tensor | None) -> int | None:
    """Return the axis of the samples in a tensor of passes with two and three of them."""
    if two is None or three is None:
        return 0
    _refuse_nested(layer, two)
    if two.shape == three.shape:
        return None
    grown = []
    if two.ndim == three.ndim:
        shapes = enumerate(zip(two.shape, three.shape, strict=True))
        grown = [axis for axis, (before, after) in shapes if before != after]
    if len(grown) == 1:
        (axis,) = grown
        is_first = two.shape[axis] * 3 == three.shape[axis] * 2 and (axis == 0 or two.shape[axis] == 2)
        if is_first and _agree(two.movedim(axis, 0), three.movedim(axis, 0)):
            return axis
    raise MixedRowsError(
        f"the rows of a layer {type(layer).__name__}{tuple(two.shape)} inside the model are not those of the samples in order, as in "
        "mixtures of experts and where windows come before samples, so its activations have no value per sample. Choose scores of "
        "the logits, of the head or of gradients"
    )


def _number_of_axes(value: Tensor | None) -> int:
    return 0 if value is None else value.ndim


def _refuse_nested(layer: nn.Module, values: Tensor) -> None:
    if values.is_nested:
        raise MixedRowsError(
            f"a layer {type(layer).__name__} inside the model has a nested tensor, whose samples have different numbers of rows, so its "
            "activations have no value per sample. Run these layers on padded tensors, for a TransformerEncoder with "
            "enable_nested_tensor=False; or choose scores of the logits, of the head or of gradients"
        )


def _agree(two: Tensor, three: Tensor) -> bool:
    """Return whether the rows of the first two samples are the same up to rounding."""
    rows = len(two)
    return (
        difference(two, three[:rows]) <= ROUNDING_OF_LAYERS
        if two.is_floating_point()
        else torch.equal(two, three[:rows])
    )
