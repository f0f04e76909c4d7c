"""Collects the uses of each chosen parameter in the backward passes of a forward pass."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import torch
from torch import Tensor

from lightning_gradmetrics.engine.derivation import pulled_back
from lightning_gradmetrics.engine.passes.agreement import VerificationNotes
from lightning_gradmetrics.engine.passes.plan import Plan, PlanError, Source
from lightning_gradmetrics.engine.passes.row_sums import RowSums
from lightning_gradmetrics.engine.passes.sorted_rows import SortedCall
from lightning_gradmetrics.engine.passes.tracer_state import TracerState
from lightning_gradmetrics.engine.rules import Call, Rule
from lightning_gradmetrics.engine.tracing.axes import Axis
from lightning_gradmetrics.engine.tracing.calls import Silence
from lightning_gradmetrics.engine.tracing.graph import gradients_at
from lightning_gradmetrics.engine.uses import RowsUse, Use, combined

__all__ = ["CollectingPass", "Sink"]

Sink = Callable[[str, Use], None]
"""Receives the use of a parameter, by the parameter's name."""

_UNGUARDED = nullcontext()


class CollectingPass(TracerState):
    """A forward pass whose backward passes turn the arriving gradients into uses, and pass these to ``sink``.

    Args:
        plan: The plan of the calls.
        parameters: The chosen parameters by name; they must not require gradients.
        size: The number of samples.
        sink: Called once per parameter and backward pass, as soon as the gradient of its last use arrives.

    Attributes:
        times: The number of positions of a sample on each axis, in the order of the calls.
        notes: Filled in a run that verifies a plan.
        rows: Gets the sums of all samples' gradients from other formulas.
    """

    def __init__(self, plan: Plan, parameters: Mapping[str, Tensor], size: int, sink: Sink) -> None:
        super().__init__(plan, parameters, size)
        self.sink = sink
        self.times: list[int] = []
        self.notes: VerificationNotes | None = None
        self.rows: RowSums | None = None
        self._leaves: dict[str, Tensor] = {}
        self._derived: dict[Source, Tensor] = {}
        self._pending: defaultdict[str, list[Use]] = defaultdict(list)
        self._silence = Silence(self.device.type)
        self._collecting, self._checkpoints = True, False
        self._backward, self._last = False, False

    # -- forward ------------------------------------------------------------------------------------------------------

    def _leaf(self, tensor: Tensor) -> Tensor:
        """Return a parameter's leaf in the graphs of derived tensors; any other tensor unchanged."""
        name = self._tracked.get(id(tensor))
        if not isinstance(name, str) or tensor is not self.parameters[name]:
            return tensor
        if name not in self._leaves:
            self._leaves[name] = self._new_leaf(tensor)
            self._tracked[id(self._leaves[name])] = name
            self.outline.add_leaf(self._leaves[name], tensor)
        return self._leaves[name]

    def _new_leaf(self, parameter: Tensor) -> Tensor:
        return parameter.detach().requires_grad_()

    @cached_property
    def _expected(self) -> Counter[str]:
        """The number of uses of each parameter."""
        return Counter()

    def _expect(self, source: Source) -> None:
        """Note a use of the parameters behind a source."""
        if self._collecting:
            for name in self._roots[source]:
                self._expected[name] += 1

    # -- backward -----------------------------------------------------------------------------------------------------

    def collect(self, logits: Tensor, gradient: Tensor, last: bool) -> None:
        """Collect the gradients of an objective from its gradient with respect to the logits, ``(N, C)``.

        The graph is freed after the last objective's.
        """
        self.backward(logits, last, gradient)

    def backward(self, total: Tensor, last: bool = True, gradient: Tensor | None = None) -> None:
        """Run the backward pass with a gradient (1 for a scalar); the sink receives every reached parameter once."""
        self._backward, self._last = True, last
        try:
            if total.requires_grad:
                with torch.autograd.set_multithreading_enabled(False):
                    self._run_backward(total, gradient, last)
        finally:
            self._backward = False
        for name in list(self._pending):
            self._finish(name)

    def _run_backward(self, total: Tensor, gradient: Tensor | None, last: bool) -> None:
        gradients_at(total, [self.anchor], gradient, not last)

    def _rule_gradient(
        self, found: Rule, call: Call, slots: Mapping[str, Source], version: int, g: Tensor | None
    ) -> None:
        if g is None:
            raise PlanError("a custom autograd function returns no gradient for a layer's output")
        if call.values["input"]._version != version:
            raise PlanError("a layer's input was changed in place after its use")
        with self._silence, self._guarded(slots.values()):
            self._scale(slots.values(), call.values["input"], g, call.out)
            rows = found.split(call.out, g)
            if self.rows is not None:
                self.rows.add(found, call, slots, rows)
            for slot, use in found.uses(call, rows):
                self._arrive(slots[slot], use)
        if self._last:  # the graph keeps this hook, and so the layer's input, until the whole pass ends
            call.values.clear()

    def _sorted_gradient(self, call: SortedCall, g: Tensor) -> None:
        if call.is_changed():
            raise PlanError("a layer's input was changed in place after its use")
        with self._silence, self._guarded(call.sources):
            if self.notes is not None:
                self._scale(call.sources, *call.factors(g), call.axis)
            if self.rows is not None:
                self.rows.leave_out(self._names(call.sources))
            for source, use in call.uses(g):
                self._arrive(source, use)
        if self._last:
            call.clear()

    def _guarded(self, sources: Iterable[Source]) -> AbstractContextManager[None]:
        """During verification, attribute an error to the parameters that it concerns."""
        return _UNGUARDED if self.notes is None else self.notes.guarding(self._names(sources))

    def _names(self, sources: Iterable[Source]) -> set[str]:
        """Return the names of the parameters behind some sources."""
        return set().union(*map(self._roots.__getitem__, sources))

    def _copy_gradient(self, source: Source, g: Tensor) -> None:
        with self._silence, self._guarded([source]):
            self._scale([source], g, g)
            if self.rows is not None:
                self.rows.leave_out(self._names([source]))
            self._arrive(source, RowsUse(g))

    def _scale(self, sources: Iterable[Source], x: Tensor, g: Tensor, axis: Axis | None = None) -> None:
        """Record the magnitude of a gradient's terms during verification."""
        if self.notes is not None:
            with self._silence:
                self.notes.add_scale(self._names(sources), x, g, axis or Axis(0))

    def _arrive(self, source: Source, use: Use) -> None:
        if not self._backward:
            raise PlanError("the model computes gradients in its forward pass")
        names, derived = self._roots[source], self._derived.get(source)
        uses = [use] if derived is None else pulled_back(use, derived, [*map(self._leaves.__getitem__, names)])
        for name, part in zip(names, uses, strict=True):
            self._pending[name].append(part)
            if len(self._pending[name]) == self._expected[name] and not self._checkpoints:
                self._finish(name)

    def _finish(self, name: str) -> None:
        if self._silence.depth and self.notes is None:
            self.sink(name, combined(self._pending.pop(name)))
            return
        with self._silence, self._guarded([name]):
            self.sink(name, combined(self._pending.pop(name)))
