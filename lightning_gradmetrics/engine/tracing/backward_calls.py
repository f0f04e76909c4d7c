"""Records the calls that custom autograd functions make in a backward pass, as an outline records those of a forward pass.

The backward pass of such a function is code of the user: it may take another path in larger batches, or with other constants. Each
tensor in it is recorded as a gradient that the function gets, as a tensor of the forward pass, or as the result of an earlier call. So
equal records show that the code did the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from lightning_gradmetrics.classifier.tensor_records import version_of
from lightning_gradmetrics.engine.tracing.graph import all_nodes, is_custom, is_of_user
from lightning_gradmetrics.engine.tracing.outline import Outline, Recording

__all__ = ["BackwardCalls", "recorded_backward"]

_NESTED = frozenset(["backward", "grad"])
"""Functions that start another backward pass, in which custom functions are not recorded."""

_NUMBERS = itertools.count()
"""Numbers of unknown tensors: no two share one."""


class BackwardCalls(Outline):
    """The calls of all custom functions in one backward pass.

    Args:
        forward: The outline of the forward pass, with the places of its tensors in the graph.
        recording: The mode to record with, which is active while a custom function runs.

    Attributes:
        has_hooks: Whether hooks may change gradients, a function belongs to torch, as those for hooks on modules do, or a function
            starts another backward pass.
    """

    def __init__(self, forward: Outline, recording: Recording | None = None) -> None:
        super().__init__()
        self._forward = forward
        self._recording = Recording(self) if recording is None else recording
        self._recording.outline = self
        self._node: Any = None
        self._given: Sequence[Tensor | None] = ()

    def follow(self, node: Any) -> list[Any]:
        """Record the calls of one function when it runs, and return the handles of the hooks for that."""

        def begin(gradients: Sequence[Tensor | None]) -> None:
            with torch._C.DisableTorchFunction():
                self._begin(node, gradients)
            # A mode around the whole pass would intercept the call that starts it, and no call inside.
            self._recording.__enter__()  # type: ignore[no-untyped-call]

        def end(results: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
            self._recording.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            with torch._C.DisableTorchFunction():
                self._finish(results)

        handles = [node.register_prehook(begin), node.register_hook(end)]
        are_alone = all(len(handle.hooks_dict_ref()) == 1 for handle in handles)
        self.has_hooks = self.has_hooks or not are_alone or not is_of_user(node)
        return handles

    def release(self) -> None:
        """Release the forward pass, whose graph may refer to this object through hooks, which no garbage collector sees."""
        self._forward, self._node, self._given = Outline(), None, ()

    def _begin(self, node: Any, gradients: Sequence[Tensor | None]) -> None:
        """Note which tensors of the forward pass the function got and returned, and the gradients that it gets."""
        self._node, self._given = node, gradients
        self._calls += (type(node)._forward_cls, len(gradients), *map(self._place, node.next_functions))
        for number, gradient in enumerate(gradients):
            self._calls.append(gradient is None)
            if gradient is not None:
                self._calls.append(self._place((node, number)))
                self.leaves[id(gradient)] = ("gradient", number, version_of(gradient))

    def _place(self, edge: tuple[Any, int]) -> Hashable:
        """Return which tensor of the forward pass has a place in the graph."""
        return "" if edge[0] is None else (self._forward.places or {}).get(edge, f"unknown {next(_NUMBERS)}")

    def _finish(self, results: Sequence[Tensor | None]) -> None:
        """Note the gradients that the function returns."""
        for result in results:
            if result is None:
                self._calls.append("")
                continue
            self._calls.append(self.origin(result) or f"unknown {next(_NUMBERS)}")
            self._axes.append(result.ndim)
            self.sizes += result.shape
        self._node, self._given = None, ()
        self.leaves.clear()

    def add(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Add one call. A contiguous copy has the origin of its source: one sample alone may need no copy, and another batch may."""
        self.has_hooks = self.has_hooks or getattr(function, "__name__", "") in _NESTED
        origin = self.origin(args[0]) if function == Tensor.contiguous and len(args) == 1 and not kwargs else None
        if origin is None:
            super().add(function, args, kwargs, result)
        elif result is not args[0]:
            self._made[id(result)] = ref(result), origin, version_of(result)

    def origin(self, tensor: Tensor) -> Hashable:
        """Return where a tensor comes from; ``None`` if that is unknown."""
        own = super().origin(tensor)
        if own is not None:
            return own
        known = self._forward.origin(tensor)
        if known is not None:
            return "forward", known
        # autograd returns a stored result of the function as a new tensor, with the place of that result in the graph
        return ("result", tensor.output_nr) if tensor.grad_fn is self._node else None


@contextmanager
def recorded_backward(forward: Outline, logits: Tensor, recording: Recording | None = None) -> Iterator[BackwardCalls]:
    """Record the calls of the custom functions in the backward pass inside the block, and add them to the outline.

    Args:
        forward: The outline of the forward pass.
        logits: Its logits.
        recording: The mode to record with.
    """
    calls, handles = BackwardCalls(forward, recording), []
    try:
        for node in all_nodes(logits):
            if is_custom(node):
                handles += calls.follow(node)
        yield calls
        forward.backward.append(calls)
    finally:
        for handle in handles:
            handle.remove()
        calls.release()
