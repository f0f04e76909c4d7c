"""The interface of rules, which map a layer's call and the gradient of its output to the uses of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lightning_gradmetrics.engine.kernels import position_sums
from lightning_gradmetrics.engine.tracing.axes import Axis
from lightning_gradmetrics.engine.tracing.calls import made_contiguous, map_arguments
from lightning_gradmetrics.engine.uses import Use
from lightning_gradmetrics.gradients.precision import wide_dtype as wide

__all__ = ["RULES", "Call", "Rule", "all_but_last", "bind", "first_axis", "one_axis", "rule", "summed", "wide"]


@dataclass
class Call:
    """One call of a function that has a rule.

    Args:
        values: Its arguments by name, without those that were not given.
        axis: The sample axis of its input.
        out: The sample axis of its output.
        slots: The names of the arguments whose gradients are wanted.
    """

    values: dict[str, Any]
    axis: Axis
    out: Axis
    slots: frozenset[str]

    @property
    def x(self) -> Tensor:
        """The input, ``(N, times, *others)``."""
        return self.axis.split(self.values["input"])

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument, or ``default`` if it was left out or is ``None``."""
        value = self.values.get(name)
        return default if value is None else value

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor argument."""
        return tuple(self.values[name].shape)


Function = Callable[[Call, Tensor], Iterator[tuple[str, Use]]]
Sums = Callable[[Call, Tensor], dict[str, Tensor]]


def one_axis(values: dict[str, Any]) -> int:
    """Return 1: only positions on the first axis are independent."""
    return 1


def all_but_last(values: dict[str, Any]) -> int:
    """Return the number of axes of the input without the last."""
    return int(values["input"].ndim) - 1


@dataclass(frozen=True)
class Rule:
    """A rule for one torch function.

    Args:
        uses: Returns the uses of ``call.slots`` from the call and its output gradient ``(N, times, *others)``.
        arguments: The function's arguments in order.
        weights: Those that may be parameters.
        accepts: Whether the rule covers a call.
        dense: Whether to make the input contiguous, for the arguments of a call; never if ``None``.
        run: Computes the call from its arguments by name; used where constant parameters allow a cheaper backward pass
            than the function's own.
        row_axes: Returns, for the arguments, the number of leading axes of input and output whose positions are
            independent.
        takes_rows: Whether ``uses`` also takes the gradient of an output ``(N, D)``, without an axis of positions.
        sums: Returns the sums of the entries of each sample's gradient, ``(N,)`` by slot, from another formula than ``uses``.
            All rows of a batch are checked by them. If it is ``None``, they are computed by the function.
        function: The function; ``None`` if a call is no single function of torch.
    """

    uses: Function
    arguments: tuple[str, ...]
    weights: frozenset[str]
    accepts: Callable[[Call], bool]
    dense: Callable[[dict[str, Any]], bool] | None = None
    run: Callable[[dict[str, Any]], Tensor] | None = None
    row_axes: Callable[[dict[str, Any]], int] = one_axis
    takes_rows: bool = False
    sums: Sums | None = None
    function: Any = None

    def made_dense(self, values: dict[str, Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the arguments of a call, with a contiguous input if that is faster."""
        if not self._copies(values):
            return args, kwargs
        x = values["input"]
        return map_arguments(partial(made_contiguous, x), args), map_arguments(partial(made_contiguous, x), kwargs)

    def dense_values(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by name, with a contiguous input if that is faster."""
        return {**values, "input": values["input"].contiguous()} if self._copies(values) else values

    def _copies(self, values: dict[str, Any]) -> bool:
        return self.dense is not None and not values["input"].is_contiguous() and self.dense(values)

    def split(self, out: Axis, gradient: Tensor) -> Tensor:
        """Return the gradient of an output in the form that ``uses`` takes."""
        if self.takes_rows and gradient.ndim == 2 and out.times == 1 and out.dim == 0:
            return gradient
        return out.split(gradient)


RULES: dict[Any, Rule] = {}
"""Rules by torch function."""


def first_axis(call: Call) -> bool:
    """Return whether the samples are on the first axis."""
    return call.axis.dim == 0 == call.out.dim


def summed(tensor: Tensor) -> Tensor:
    """Return sum ``(N, C, *S)`` over the positions ``S``, in float32 for half precision."""
    return position_sums(tensor)[0].to(wide(tensor.dtype))


def rule(
    *functions: Any,
    arguments: str,
    weights: str,
    accepts: Callable[[Call], bool] = first_axis,
    dense: Callable[[dict[str, Any]], bool] | None = None,
    run: Callable[[dict[str, Any]], Tensor] | None = None,
    row_axes: Callable[[dict[str, Any]], int] = one_axis,
    takes_rows: bool = False,
    sums: Sums | None = None,
) -> Callable[[Function], Function]:
    """Register a rule for torch functions; ``arguments`` and ``weights`` are names separated by spaces."""

    def register(uses: Function) -> Function:
        for function in functions:
            names, slots = tuple(arguments.split()), frozenset(weights.split())
            RULES[function] = Rule(uses, names, slots, accepts, dense, run, row_axes, takes_rows, sums, function)
        return uses

    return register


def bind(found: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Return a call's arguments by the names of its rule; ``None`` if they do not fit."""
    if len(args) > len(found.arguments):
        return None
    values = dict(zip(found.arguments, args, strict=False))
    if kwargs:
        if not kwargs.keys() <= set(found.arguments):
            return None
        values.update(kwargs)
    return values
