"""Records the calls inside a function that torch implements in Python, so that a later batch repeats them without it.

``torch.nn.functional.batch_norm`` and ``embedding`` are such functions. Their arguments determine these calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.passes.plan import Step
from lightning_gradmetrics.engine.rules import Rule
from lightning_gradmetrics.engine.tracing.axes import Axis
from lightning_gradmetrics.engine.tracing.calls import DECOMPOSED, has_tensors

__all__ = ["HeldNorm", "HeldStep", "InnerCall", "InnerCalls", "Picker", "is_constant", "picker"]

Picker = Callable[[Sequence[Any]], tuple[Any, ...]]
"""Returns some entries of a list as a tuple."""

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, type(...))


@dataclass(frozen=True)
class HeldStep:
    """A step by a rule, whose gradients are computed after the backward pass.

    Args:
        step: The step.
        rule: The rule.
        slots: The parameters by the names of the arguments.
        axis: The sample axis of the input.
        out: The sample axis of the output.
        names: The names of the arguments.
        length: The length of the sample axis of the input.
        run: The function of the rule that computes the result; ``None`` if the function of the step does.
        norm: The norm whose output a folded convolution returns; ``None`` for other steps.
    """

    step: Step
    rule: Rule
    slots: dict[str, str]
    axis: Axis
    out: Axis
    names: frozenset[str]
    length: int
    run: Callable[[dict[str, Any]], Tensor] | None
    norm: HeldNorm | None = None


@dataclass(frozen=True)
class HeldNorm:
    """A batch norm that is folded into a convolution.

    Args:
        numbers: The number of each of its tensors among the entries of the path, by the name of the argument.
        eps: Added to the variance.
    """

    numbers: Mapping[str, int]
    eps: float


@dataclass(frozen=True)
class InnerCall:
    """A call inside a function.

    Args:
        function: The called function.
        pick: Returns its arguments from the arguments of the outer call, the results of the inner calls, and constants.
        names: The names of the last arguments, which were passed by keyword.
        held: How the parameters' gradients follow from that of the result; ``None`` if the call has no parameters.
    """

    function: Any
    pick: Picker
    names: tuple[str, ...]
    held: HeldStep | None


class InnerCalls:
    """The calls inside one function."""

    def __init__(self) -> None:
        self._calls: list[tuple[Any, tuple[Any, ...], tuple[str, ...], HeldStep | None]] = []
        self._results: list[Tensor] = []
        self._is_simple = True

    def __len__(self) -> int:
        return len(self._calls)

    def add(
        self, function: Any, args: Any, kwargs: Mapping[str, Any], result: Any, held: HeldStep | None, steps: int
    ) -> None:
        """Add a call, with its step of the plan and the number of steps that it takes."""
        if not has_tensors(result) and result is not None:
            return
        is_known = steps == 0 or (held is not None and steps == 1 and held.step.function == function)
        self._is_simple = self._is_simple and is_known and type(result) is Tensor and torch.is_grad_enabled()
        self._calls.append((function, (*args, *kwargs.values()), tuple(kwargs), held if steps else None))
        self._results.append(result)

    def repeatable(
        self, outer: Any, values: Sequence[Any], result: Tensor
    ) -> tuple[tuple[InnerCall, ...], tuple[Any, ...]]:
        """Return the calls and their further entries; nothing if they do not follow from the arguments of the outer function.

        Args:
            outer: The outer function.
            values: Its arguments.
            result: Its result.

        Returns:
            The calls, and ``None`` for each result and their constants, which follow the arguments in the list that the calls
            pick from.
        """
        is_of_torch = outer in DECOMPOSED or getattr(outer, "__module__", "").startswith("torch.")
        if not (self._is_simple and is_of_torch and self._results and result is self._results[-1]):
            return (), ()
        places = {id(value): place for place, value in enumerate(values) if isinstance(value, Tensor)}
        calls: list[InnerCall] = []
        constants: list[Any] = []
        for place, (function, arguments, names, held) in enumerate(self._calls, len(values)):
            numbers: list[int] = []
            for value in arguments:
                if id(value) in places:
                    numbers.append(places[id(value)])
                elif is_constant(value):
                    constants.append(value)
                    numbers.append(-len(constants))
                else:
                    return (), ()
            calls.append(InnerCall(function, picker(numbers), names, held))
            places[id(self._results[place - len(values)])] = place
        return tuple(calls), (*[None] * len(calls), *reversed(constants))


def picker(numbers: Sequence[int]) -> Picker:
    """Return a function that returns the entries with these numbers; negative numbers count from the end.

    Example:
        >>> picker([1, -1])("abc"), picker([0])("abc")
        (('b', 'c'), ('a',))
    """
    if len(numbers) > 1:
        return itemgetter(*numbers)
    return lambda entries: tuple(map(entries.__getitem__, numbers))


def is_constant(value: Any) -> bool:
    """Return whether an argument is a constant, or a tuple, list or slice of constants."""
    if isinstance(value, (tuple, list)):
        return all(map(is_constant, value))
    if type(value) is slice:
        return is_constant((value.start, value.stop, value.step))
    return isinstance(value, _PLAIN)
