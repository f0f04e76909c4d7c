"""Repeats the known forward pass of a large batch: results are released after their last use, and gradients are used as they arrive."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from lightning_gradmetrics.engine.passes.collecting_pass import Sink
from lightning_gradmetrics.engine.passes.folding import METADATA, FoldRefused, hidden_tensor, result_in_layout
from lightning_gradmetrics.engine.passes.in_place import SUMS
from lightning_gradmetrics.engine.passes.inner_calls import HeldNorm, HeldStep
from lightning_gradmetrics.engine.passes.known_calls import KnownCall, KnownPath
from lightning_gradmetrics.engine.passes.known_path import DirectPass
from lightning_gradmetrics.engine.passes.path_check import PathChanged
from lightning_gradmetrics.engine.passes.plan import PlanError
from lightning_gradmetrics.engine.passes.shuffles import shuffled_images
from lightning_gradmetrics.engine.rules import RULES, bind
from lightning_gradmetrics.engine.rules.folded import run_folded
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.calls import Silence, sources_in
from lightning_gradmetrics.engine.tracing.graph import gradients_at, with_graph

__all__ = ["LargePass"]


class LargePass(DirectPass):
    """A direct pass with a hook on the result of each layer, and with the folds and the layout of the recorded pass.

    Args:
        path: The path.
        task: The batch.
        sink: Called once per parameter and backward pass.

    Raises:
        PathChanged: If the model has other leaves.
    """

    def __init__(self, path: KnownPath, task: Task, sink: Sink) -> None:
        super().__init__(path, task, sink)
        self._silence = Silence(self._device.type)
        self._folded: dict[int, tuple[Tensor, Tensor]] = {}
        self._hidden: list[ReferenceType[Tensor]] = []
        self._last = False

    # -- forward ------------------------------------------------------------------------------------------------------

    def _run(self, known: KnownCall, values: Sequence[Any], args: Any, kwargs: Any) -> Any:
        if known.is_norm:
            uses = sources_in(self._folded, values, {})
            result = uses[0][1] if len(uses) == 1 else self._lose()
        elif known.in_place is not None:
            result = self._in_place(known, values, known.in_place)
        else:
            shuffled = shuffled_images(known.function, args, kwargs) if self._path.lays_out else None
            result = super()._run(known, values, args, kwargs) if shuffled is None else shuffled
        return self._hide(result) if known.is_hidden else result

    def _in_place(self, known: KnownCall, values: Sequence[Any], place: int) -> Tensor:
        """Return the result of a ReLU or of a sum, written into the memory of an argument that nothing else uses."""
        _, tensor = self._folded[id(values[place])]
        if known.function not in SUMS:
            return torch.relu_(tensor)
        other: Tensor = values[1 - place]
        return tensor.add_(other) if other.stride() == tensor.stride() else tensor + other

    def _operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        if sources_in(self._folded, args, kwargs):
            self._lose()
        return super()._operator(func, args, kwargs)

    def _harmless(self, func: Any, args: Any, kwargs: Any) -> Any:
        uses = sources_in(self._folded, args, kwargs) if self._folded else ()
        if not uses:
            return super()._harmless(func, args, kwargs)
        if func not in METADATA:
            self._lose()
        return func(uses[0][1], *args[1:], **kwargs)

    def _hold(self, held: HeldStep, args: Any, kwargs: Any) -> Tensor:
        """Run a step with a hook on its result."""
        function = held.step.function
        values = bind(RULES[function], args, kwargs) or {}
        if held.norm is not None:
            return self._fold(held, held.norm, values)
        result = self._in_layout(function, values)
        if result is None:
            result = self._computed(held, values, args, kwargs)
        return self._hooked(held, values, result)

    def _in_layout(self, function: Any, values: dict[str, Any]) -> Tensor | None:
        if not self._path.lays_out:
            return None
        try:
            return result_in_layout(function, values)
        except FoldRefused:
            self._lose()

    def _fold(self, held: HeldStep, norm: HeldNorm, values: dict[str, Any]) -> Tensor:
        """Run a convolution that returns the output of its norm."""
        tensors = {key: self._entries[number] for key, number in norm.numbers.items()}
        return self._hide(self._hooked(held, values, run_folded(held.step.function, values, tensors, norm.eps)))

    def _hide(self, output: Tensor) -> Tensor:
        """Return a tensor without values, which the model has instead of an output that only a known call may use."""
        if torch._C._len_torch_dispatch_stack():
            self._lose()
        hidden = hidden_tensor(output)
        self._folded[id(hidden)] = hidden, output
        self._hidden.append(ref(hidden))
        return hidden

    def _hooked(self, held: HeldStep, values: dict[str, Any], result: Tensor) -> Tensor:
        result = with_graph(result, self._anchor)
        hook = partial(self._gradient, held, values, values["input"]._version)
        result.register_hook(hook)  # type: ignore[no-untyped-call]
        return result

    def require_end(self, logits: Tensor) -> None:
        """Require what the other passes do, and that the model stores no tensor without values."""
        super().require_end(logits)
        self.release()
        if any(hidden() is not None for hidden in self._hidden):
            raise PathChanged

    def release(self) -> None:
        """Release all tensors of the forward pass."""
        super().release()
        self._folded.clear()

    # -- backward -----------------------------------------------------------------------------------------------------

    def collect(self, logits: Tensor, gradient: Tensor, last: bool) -> None:
        """Collect the gradients of an objective from its gradient with respect to the logits, ``(N, C)``.

        The graph is freed after the last objective's.

        Raises:
            PlanError: If the input of a layer was changed in place after its use.
        """
        self._last = last
        if logits.requires_grad:
            with torch.autograd.set_multithreading_enabled(False):
                gradients_at(logits, [self._anchor], gradient, not last)

    def _gradient(self, held: HeldStep, values: dict[str, Any], version: int, g: Tensor | None) -> None:
        if g is None:
            raise PlanError("a custom autograd function returns no gradient for a layer's output")
        with self._silence:
            self._send(held, values, version, g)
        if self._last:  # the graph keeps this hook, and so the layer's input, until the whole pass ends
            values.clear()
