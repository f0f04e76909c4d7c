"""Functions that launch kernels, as operators of torch while a plan is traced, and as plain functions otherwise."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["Operator", "is_traced", "noted", "noted_tensors", "operator", "reads_are_slow", "traced_operators"]

_LIBRARY = torch.library.Library("lightning_gradmetrics", "FRAGMENT")  # type: ignore[no-untyped-call]

_noted: list[Tensor] | None = None


class _OfThread(threading.local):
    """Whether the current thread traces operators; another thread may compute meanwhile."""

    traces = False


_THREAD = _OfThread()


Result = TypeVar("Result")


class Operator(Generic[Result]):
    """A function of tensors that is one node of a traced graph, whatever it does inside.

    Args:
        function: The function. Its results share no memory with its arguments.
        schema: Its arguments and results in torch's notation, such as ``"(Tensor x, int size) -> Tensor"``.
        empty: Returns results of the right shape, type and device, with any values.
    """

    def __init__(self, function: Callable[..., Result], schema: str, empty: Callable[..., Any]) -> None:
        self.function, self.schema, self.empty = function, schema, empty
        self.__doc__ = function.__doc__

    def __call__(self, *args: Any) -> Result:
        """Return the function's result, in a trace without a graph of autograd."""
        if not _THREAD.traces:
            return self.function(*args)
        with torch.no_grad():
            result: Result = self._registered(*args)
        return result

    @cached_property
    def _registered(self) -> Any:
        # torch.library.custom_op would add as much time to each call as the kernels of a small model take.
        name = self.function.__name__.strip("_")
        _LIBRARY.define(f"{name}{self.schema}", tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, self.function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"lightning_gradmetrics::{name}", self.empty, lib=_LIBRARY)
        return getattr(torch.ops.lightning_gradmetrics, name).default


def operator(schema: str, empty: Callable[..., Any]) -> Callable[[Callable[..., Result]], Operator[Result]]:
    """Return a decorator that makes an :class:`Operator` of a function; see there for the arguments."""
    return lambda function: Operator(function, schema, empty)


@contextmanager
def traced_operators() -> Iterator[None]:
    """Call operators through torch inside the block, so that a trace records them."""
    before, _THREAD.traces = _THREAD.traces, True
    try:
        yield
    finally:
        _THREAD.traces = before


def is_traced() -> bool:
    """Return whether the current thread traces a plan."""
    return _THREAD.traces


def reads_are_slow(tensor: Tensor) -> bool:
    """Return whether Python waits for a device to read a value of such a tensor, or cannot read it in a trace."""
    return _THREAD.traces or tensor.device.type != "cpu"


def noted(tensor: Tensor) -> Tensor:
    """Return a stored tensor, and add it to the list of :func:`noted_tensors`."""
    if _noted is not None:
        _noted.append(tensor)
    return tensor


@contextmanager
def noted_tensors() -> Iterator[list[Tensor]]:
    """Collect the stored tensors that kernels read inside the block, in a list.

    A CUDA graph reads them in every replay, so it must hold them even if a cache drops them.
    """
    global _noted
    before, _noted = _noted, []
    try:
        yield _noted
    finally:
        _noted = before
