"""The calls of a forward pass with which a later one is compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.passes.inner_calls import HeldStep, InnerCall, Picker

__all__ = ["KnownCall", "KnownPath", "TensorList", "described", "is_equal", "releasing"]


@dataclass(frozen=True)
class TensorList:
    """An argument that is a list or a tuple with tensors, as those of ``torch.cat``, or an index like ``mask, :``.

    Args:
        kind: Its type.
        numbers: The numbers of its items among the entries of the path, negative for constants.
        pick: Returns them from the entries.
    """

    kind: Any
    numbers: tuple[int, ...]
    pick: Picker

    def matches(self, value: Any, entries: Sequence[Any]) -> bool:
        """Return whether an argument is a list of these items."""
        if type(value) is not self.kind or len(value) != len(self.numbers):
            return False
        expected = self.pick(entries)
        if all(map(is_, value, expected)):
            return True
        for item, number, entry in zip(value, self.numbers, expected, strict=True):
            if item is not entry and (number >= 0 or not is_equal(item, entry)):
                return False
        return True


@dataclass(frozen=True)
class KnownCall:
    """A recorded call.

    Args:
        function: The function.
        numbers: The number of each argument among the entries of the path, see :class:`KnownPath`.
        pick: Returns the arguments from the entries.
        names: The names of the last arguments, which were passed by keyword.
        has_gradients: Whether gradients were enabled.
        dtype: The type of the result; ``None`` if that is not a single tensor.
        shape: Its shape, likewise.
        has_sources: Whether the plan has steps for this call.
        held: How the parameters' gradients follow from that of the result; ``None`` if the ordinary step is repeated.
        inner: The calls inside a function that torch implements in Python, if they can be repeated without it.
        spare: The entries of the inner calls: ``None`` for each result, then the constants.
        tensors: The number of each tensor among the arguments, and how often it was changed in place since it was made.
        released: The numbers of the results whose last use is this call, on a large path.
        is_norm: Whether it is a batch norm whose output is that of the folded convolution before it.
        is_hidden: Whether a later call changes the result in place, and nothing else uses it, on a large path.
        in_place: The place of the argument that gets the result in place of its values; ``None`` if the result is a new tensor.
        results: The description of a result that is not a single tensor; see :func:`described`.
        marks: The number of entries of each sample that a mask must select, if it is such a call.
    """

    function: Any
    numbers: tuple[int, ...]
    pick: Picker
    names: tuple[str, ...]
    has_gradients: bool
    dtype: torch.dtype | None
    shape: torch.Size | None
    has_sources: bool
    held: HeldStep | None
    inner: tuple[InnerCall, ...]
    spare: tuple[Any, ...]
    tensors: tuple[tuple[int, int], ...]
    released: tuple[int, ...] = ()
    is_norm: bool = False
    is_hidden: bool = False
    in_place: int | None = None
    results: tuple[Any, ...] = ()
    marks: int | None = None

    @property
    def made(self) -> int:
        """The number of tensors in the result."""
        return 1 if self.dtype is not None else len(self.results) - self.results.count(None) - 1


@dataclass(frozen=True)
class KnownPath:
    """The calls of a forward pass on a batch of one size.

    Its entries are the leaves (inputs, parameters, buffers and tensors among the attributes), the results of the calls, and the
    constants among the arguments, whose numbers are negative.

    Args:
        calls: The calls.
        constants: The constants, in the order of the entries.
        end: The number of the tensor that is the logits, and how often it was changed in place.
        chosen: The numbers of the chosen parameters.
        leaves: The number of leaves.
        held: The steps whose gradients are computed after the backward pass, by their positions in the plan.
        is_direct: Whether all steps of the plan are held and run without the plan, and each parameter has one step.
        is_pure: Whether no tensor was changed in place, and all results are stored.
        is_large: Whether results are released after their last use.
        lays_out: Whether images are laid out channels last.
        made: The number of tensors that the calls return.
    """

    calls: tuple[KnownCall, ...]
    constants: tuple[Any, ...]
    end: tuple[int, int]
    chosen: tuple[int, ...]
    leaves: int
    held: Mapping[int, HeldStep]
    is_direct: bool
    is_pure: bool
    is_large: bool = False
    lays_out: bool = False
    made: int = 0

    @property
    def changes_layers(self) -> bool:
        """Whether layers run in another way than in the model."""
        return self.lays_out or self.is_in_place or any(call.is_norm for call in self.calls)

    @property
    def is_in_place(self) -> bool:
        """Whether calls change tensors in place that those of the model do not change."""
        return any(call.is_hidden for call in self.calls)


def releasing(calls: Sequence[KnownCall], leaves: int, end: int) -> list[KnownCall]:
    """Return calls that release each result after its last use, and compare a tensor that is never changed at its last use only.

    Args:
        calls: The calls.
        leaves: The number of leaves, which are not released.
        end: The number of the result that is the logits.
    """
    last: dict[int, int] = {}
    changed: set[int] = set()
    made = leaves
    for place, call in enumerate(calls):
        last.update(dict.fromkeys(range(made, made + call.made), place))
        made += call.made
        for number, changes in call.tensors:
            last[number] = place
            if changes:
                changed.add(number)
    uses: defaultdict[int, list[int]] = defaultdict(list)
    for number, place in last.items():
        uses[place].append(number)
    shorter: list[KnownCall] = []
    for place, call in enumerate(calls):
        compared: list[tuple[int, int]] = []
        for entry in dict.fromkeys(call.tensors):
            if entry[0] in changed or last[entry[0]] == place:
                compared.append(entry)
        released = [number for number in uses[place] if leaves <= number != end]
        shorter.append(replace(call, tensors=tuple(compared), released=tuple(released)))
    return shorter


def described(result: Any) -> tuple[Any, ...] | None:
    """Return the type, and of each entry the type and shape, of a result: ``None``, a tensor, or a list or a tuple of both.

    A number is described by its value.

    Returns:
        The description; ``None`` for other results.

    Example:
        >>> described((torch.ones(2), None))
        (<class 'tuple'>, (torch.float32, torch.Size([2])), None)
    """
    if type(result) in (bool, int, float):
        return ((type(result), repr(result)),)
    if type(result) not in (type(None), Tensor, tuple, list):
        return None
    described: list[Any] = [type(result)]
    for entry in result if isinstance(result, (tuple, list)) else (result,):
        if entry is None:
            described.append(None)
        elif type(entry) is Tensor:
            described.append((entry.dtype, entry.shape))
        else:
            return None
    return tuple(described)


def is_equal(value: Any, constant: Any) -> bool:
    """Return whether an argument is a constant; ``-0.0`` is not ``0.0``, and 1 is not ``True``.

    Example:
        >>> is_equal([3, 3], [3, 3]), is_equal(-0.0, 0.0)
        (True, False)
    """
    return value is constant or (type(value) is type(constant) and repr(value) == repr(constant))
