"""One node of the graph for several entries of one tensor along its first axis, as in ``q, k, v = qkv[0], qkv[1], qkv[2]``.

The backward pass of each ``x[i]`` fills a tensor of the size of ``x`` with zeros, and autograd adds these tensors. If the
entries are those of ``x.unbind(0)``, their gradients are stacked instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_gradmetrics.engine.passes.plan import PlanError
from lightning_gradmetrics.engine.tracing.trace import CallTrace

__all__ = ["SelectsRefused", "has_repeated_selects", "joined_selects"]

MOST_ENTRIES = 64
"""Largest length of an axis whose entries are joined."""

LEAST_SIZE = 2**16
"""Smallest number of entries of a tensor for which this takes less time."""


class SelectsRefused(PlanError):
    """The model changes an entry in place, which autograd allows for ``x[i]`` but not for the results of ``x.unbind(0)``."""


def has_repeated_selects(trace: CallTrace) -> bool:
    """Return whether a forward pass reads several entries of one tensor along its first axis."""
    counts = Counter(id(call.args[0]) for call in trace.calls if _is_select(call.function, call.args, call.kwargs))
    return max(counts.values(), default=0) > 1


def _is_select(function: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Return whether a call is ``x[i]`` on a tensor with a gradient."""
    if function is not Tensor.__getitem__ or kwargs or len(args) != 2 or type(args[1]) is not int:
        return False
    x = args[0]
    return type(x) is Tensor and x.requires_grad and 1 < len(x) <= MOST_ENTRIES and x.ndim > 1


class _Joined(TorchFunctionMode):
    """Returns the results of ``unbind`` in the place of selected entries, each of them once."""

    def __init__(self) -> None:
        super().__init__()
        self._tensor: Tensor | None = None
        self._version = -1
        self._entries: list[Tensor | None] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and _is_select(func, args, kwargs):
            entry = self._taken(*args)
            if entry is not None:
                return entry
        return func(*args, **(kwargs or {}))

    def _taken(self, x: Tensor, index: int) -> Tensor | None:
        """Return an entry; ``None`` if the tensor is small, or the entry was returned before."""
        if x.numel() < LEAST_SIZE or not -len(x) <= index < len(x) or not torch.is_grad_enabled():
            return None
        if x is not self._tensor or x._version != self._version:
            self._tensor, self._version, self._entries = x, x._version, list(x.unbind(0))
        entry, self._entries[index] = self._entries[index], None
        if not any(other is not None for other in self._entries):
            self._tensor = None
        return entry


@contextmanager
def joined_selects() -> Iterator[None]:
    """Join the selected entries of each tensor inside the block.

    Raises:
        SelectsRefused: If the model changes one of them in place.
    """
    try:
        with _Joined():
            yield
    except RuntimeError as error:
        if "returns multiple views" in str(error):
            raise SelectsRefused("an entry of a tensor is changed in place") from error
        raise
