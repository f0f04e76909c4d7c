"""Runs a model once and collects the uses of each chosen parameter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import _StopRecomputationError

from lightning_gradmetrics.engine.derivation import pulled_back
from lightning_gradmetrics.engine.passes.agreement import VerificationNotes
from lightning_gradmetrics.engine.passes.copied_parameters import aligned_copies, broadcast_arguments, mapped_call
from lightning_gradmetrics.engine.passes.plan import Plan, PlanError, Source, Step
from lightning_gradmetrics.engine.passes.row_sums import RowSums
from lightning_gradmetrics.engine.passes.sorted_rows import GroupedProduct, LookUp, SortedCall
from lightning_gradmetrics.engine.passes.tracer_state import TracerState
from lightning_gradmetrics.engine.rules import RULES, Call, Rule, bind
from lightning_gradmetrics.engine.tracing.axes import Axis, axis_of
from lightning_gradmetrics.engine.tracing.calls import (
    Silence,
    has_tensors,
    map_arguments,
    opened,
    sources_in,
    tensors_in,
)
from lightning_gradmetrics.engine.tracing.graph import Copies, gradients_at, saves_through_hooks
from lightning_gradmetrics.engine.uses import RowsUse, Use, combined

__all__ = ["Tracer"]

Sink = Callable[[str, Use], None]
_UNGUARDED = nullcontext()


class Tracer(TracerState):
    """A forward pass that passes the per-sample gradients of chosen parameters to ``sink`` in each backward pass.

    The parameters must not require gradients. The mode is active during the forward pass and, for activation
    checkpoints, the backward pass.

    Args:
        plan: The plan of the calls.
        parameters: The chosen parameters by name.
        size: The number of samples.
        sink: Called once per parameter and backward pass, as soon as the gradient of its last use arrives.
        free: Whether an axis with several positions per sample may have a different number than planned, as for
            sequences of a different length.
    """

    def __init__(self, plan: Plan, parameters: Mapping[str, Tensor], size: int, sink: Sink, free: bool = False) -> None:
        super().__init__(plan, parameters, size)
        self.sink, self.free = sink, free
        self.times: list[int] = []
        self._leaves: dict[str, Tensor] = {}
        self._derived: dict[Source, Tensor] = {}
        self._pending: defaultdict[str, list[Use]] = defaultdict(list)
        self.position = 0
        self._delayed: list[Step] = []
        self._backward = self._checkpoints = self._recomputes = False
        self._silence = Silence(self.device.type)
        self._collecting, self._last = True, False
        self.notes: VerificationNotes | None = None
        self.rows: RowSums | None = None

    # -- forward ------------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call, as planned if it involves chosen parameters."""
        kwargs = kwargs or {}
        # A dispatcher operator is not a call of the model; a TorchDispatchMode such as FlopCounterMode calls it again.
        if self._silence.depth or type(func) is torch._ops.OpOverload:
            return func(*args, **kwargs)
        position, recorder = self.position, self.recorder
        count = 0 if recorder is None else len(recorder.inside)
        result = self._run(func, args, kwargs)
        if self._backward:
            return result
        if recorder is not None and not self._open:
            recorder.add(self.outline, func, args, kwargs, result, position, self.position)
        elif recorder is not None and len(recorder.inside) == count:  # no calls inside of this one were recorded
            recorder.add_inner(func, args, kwargs, result, position, self.position)
        if not self._open:
            self.outline.add(func, args, kwargs, result)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.plan.masks and not self._backward:
            self._compare_mask(func, args)
        sources = sources_in(self._tracked, args, kwargs)
        if not sources:
            result = func(*args, **kwargs)
            if self.plan.reads is not None and not self._backward:
                self._watch_reads(func, args, kwargs, result)
            return result
        if not self._recomputes:
            # Checkpoints that are not reentrant store no tensors, and repeat their calls in the backward pass.
            self._recomputes = saves_through_hooks()
        if self._opens(func):
            return self._inside(func, args, kwargs)
        step = self._next_step(func, sources)
        if step is None:
            result = func(*args, **kwargs)
            if has_tensors(result):
                raise PlanError(f"an unexpected call of {getattr(func, '__name__', func)}")
            return result
        try:
            return getattr(self, f"_{step.kind}")(step, args, kwargs)
        except Exception as error:
            if step.kind in ("broadcast", "vmap") and not isinstance(error, _StopRecomputationError):
                number = self.plan.steps.index(step)
                raise PlanError(f"{getattr(func, '__name__', func)}: {error}", number) from error
            raise

    def _next_step(self, function: Any, sources: tuple[Source, ...]) -> Step | None:
        """Return the step for a call: the next one or, in the backward pass, the one that a checkpoint repeats."""
        if self._backward:
            return self._again(function, sources)
        step = self.plan.steps[self.position] if self.position < len(self.plan.steps) else None
        if step is None or step.function != function or step.sources != sources:
            return None
        self.position += 1
        if not torch.is_grad_enabled() and step.kind in ("rule", "broadcast", "vmap", "grouped", "looked_up"):
            self._delayed.append(step)
            self._checkpoints = True
            return replace(step, kind="plain")
        return step

    def _again(self, function: Any, sources: tuple[Source, ...]) -> Step | None:
        """Return the step of a call in the backward pass.

        A reentrant checkpoint ran its calls without gradients in the forward pass, and their uses are collected now.
        Other checkpoints only recompute results that they did not store.
        """
        fits = [step for step in self._delayed if step.function == function and step.sources == sources]
        self._collecting = bool(fits)
        if fits:
            self._delayed.remove(fits[0])
            return fits[0]
        return next((s for s in self.plan.steps if s.function == function and s.sources == sources), None)

    def _plain(self, step: Step, args: Any, kwargs: Any) -> Any:
        return step.function(*args, **kwargs)

    def _uncovered(self, step: Step, args: Any, kwargs: Any) -> Any:
        return step.function(*self._cut(args), **self._cut(kwargs))

    def _derive(self, step: Step, args: Any, kwargs: Any) -> Any:
        """Run on leaves, and record which parameters the outputs depend on."""
        index = self.position - 1
        args, kwargs = map_arguments(self._leaf, args), map_arguments(self._leaf, kwargs)
        result = step.function(*args, **kwargs)
        outputs = list(tensors_in(result))
        names = tuple(dict.fromkeys(name for source in step.sources for name in self._roots[source]))
        for number in step.derived:
            source = (index, number)
            self._tracked[id(outputs[number])] = source
            self._derived[source] = outputs[number]
            self._roots[source] = names
        return result

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

    def _rule(self, step: Step, args: Any, kwargs: Any) -> Any:
        """Run the call unchanged and register a hook on the output."""
        rule = RULES[step.function]
        values = bind(rule, args, kwargs) or {}
        slots = self._slots(values)
        if any(values[name].requires_grad for name in slots):
            args, kwargs = self._cut(args), self._cut(kwargs)
            values = bind(rule, args, kwargs) or {}
        x = values["input"]
        axis = axis_of(x, step.inputs, args, kwargs)
        assert axis is not None and step.output is not None
        result = self._run_rule(step, rule, values, args, kwargs)
        axis, out = self._fitted(axis, x.shape), self._fitted(step.output, result.shape)
        if not self._collecting:
            return result
        for source in slots.values():
            self._expect(source)
        call = Call(values, axis, out, frozenset(slots))
        if self.recorder is not None:
            run = rule.run if self._constant(values) else None
            self.recorder.note_step(self.position - 1, step, rule, slots, call, run)
        hook = partial(self._rule_gradient, rule, call, slots, x._version)
        result.register_hook(hook)  # type: ignore[no-untyped-call]
        return result

    def _run_rule(self, step: Step, rule: Rule, values: dict[str, Any], args: Any, kwargs: Any) -> Tensor:
        """Return the result of a call, which always has a graph."""
        if rule.run is not None and self._constant(values):
            return self._rooted(step, rule.run(rule.dense_values(values)))
        args, kwargs = rule.made_dense(values, args, kwargs)
        return self._rooted(step, step.function(*args, **kwargs))

    def _grouped(self, step: Step, args: Any, kwargs: Any) -> Tensor:
        """Run a product of sorted rows; the indices of the sort show the sample of each row."""
        self._require_plain_pass()
        rule = RULES[step.function]
        slots = self._slots(bind(rule, args, kwargs) or {})
        args, kwargs = self._cut(args), self._cut(kwargs)
        values = bind(rule, args, kwargs) or {}
        values["owners"] = self.sorts.owners_in_groups(values)
        axis = Axis(0, len(values["owners"]) // self.size)
        call = Call(values, axis, axis, frozenset(slots))
        result = self._rooted(step, step.function(*args, **kwargs))
        return self._collect_sorted(GroupedProduct(rule, call, slots, values["input"]._version), result)

    def _looked_up(self, step: Step, args: Any, kwargs: Any) -> Tensor:
        """Look up rows of a table by an integer of each sorted row."""
        self._require_plain_pass()
        table, index = self._cut(args)
        (source,) = step.sources
        owners = self.sorts.owners_in_order(step.sort, len(index))
        axis = Axis(0, len(owners) // self.size)
        result = self._rooted(step, step.function(table, index))
        call = LookUp(source, tuple(table.shape), index.remainder(len(table)), owners, axis)
        return self._collect_sorted(call, result)

    def _require_plain_pass(self) -> None:
        if not self._collecting or self._recomputes or self.recorder is not None:
            raise PlanError("sorted rows are no part of a checkpoint or a known path")

    def _collect_sorted(self, call: SortedCall, result: Tensor) -> Tensor:
        for source in call.sources:
            self._expect(source)
        result.register_hook(partial(self._sorted_gradient, call))  # type: ignore[no-untyped-call]
        return result

    def _fitted(self, axis: Axis, shape: Sequence[int]) -> Axis:
        """Return the axis with the number of positions per sample that a tensor has on it.

        Raises:
            PlanError: If the number differs from the plan and must not.
        """
        length = shape[axis.dim] if len(shape) > axis.dim else -1
        if length == self.size and axis.times == 1:
            self.times.append(1)
            return axis
        if self.free and axis.times > 1 and length > 0 and length % self.size == 0:
            axis = replace(axis, times=length // self.size)
        if length != axis.times * self.size:
            raise PlanError(f"a tensor of shape {tuple(shape)} where one with {self.size} samples was expected")
        self.times.append(axis.times)
        return axis

    def _expect(self, source: Source) -> None:
        if self._collecting:
            for name in self._roots[source]:
                self._expected[name] += 1

    def _copies(self, tensor: Tensor) -> Tensor:
        """Return a copy of a parameter or derived tensor for each sample."""
        source = self._tracked[id(tensor)]
        self._expect(source)
        return Copies.apply(self._cut(tensor), self.anchor, self.size, partial(self._copy_gradient, source))  # type: ignore

    def _broadcast(self, step: Step, args: Any, kwargs: Any) -> Any:
        """Run with a copy for each sample, aligned to the axes of the output."""
        assert step.output is not None
        axis = step.output
        args, kwargs, ndim = broadcast_arguments(step.function, args, kwargs, axis)
        if self.free and axis.times > 1:
            lengths = [t.shape[axis.dim - ndim] for t in tensors_in((args, kwargs)) if t.ndim >= ndim - axis.dim]
            axis = replace(axis, times=max(1, max(lengths) // self.size))
        args, kwargs = map_arguments(lambda t: self._aligned(t, axis, ndim), (args, kwargs))
        result = step.function(*args, **kwargs)
        axis = self._fitted(axis, result.shape)
        if self.notes is not None and result.requires_grad:  # the copies get sums over axes of its gradient
            result.register_hook(lambda g: self._scale(step.sources, g, g, axis))
        return result

    def _aligned(self, tensor: Tensor, axis: Axis, ndim: int) -> Tensor:
        return aligned_copies(self._copies(tensor), axis, ndim) if id(tensor) in self._tracked else tensor

    def _vmap(self, step: Step, args: Any, kwargs: Any) -> Any:
        """Map the function over the samples, with a copy of the parameters for each."""
        assert step.output is not None
        entries: dict[int, tuple[Tensor, int]] = {}
        for tensor, axis in zip(tensors_in((args, kwargs)), step.inputs, strict=True):
            if id(tensor) in entries:
                continue
            if id(tensor) in self._tracked:
                entries[id(tensor)] = self._copies(tensor), 0
            elif axis is not None:
                entries[id(tensor)] = self._fitted(axis, tensor.shape).unflatten(tensor)
        result = mapped_call(step.function, args, kwargs, entries, step.output)
        self._fitted(step.output, result.shape)
        return result

    # -- backward -----------------------------------------------------------------------------------------------------

    def collect(self, logits: Tensor, gradient: Tensor, last: bool) -> None:
        """Collect the gradients of an objective from its gradient with respect to the logits, ``(N, C)``.

        The graph is freed after the last objective's.
        """
        self.backward(logits, last, gradient)

    def backward(self, total: Tensor, last: bool = True, gradient: Tensor | None = None) -> None:
        """Run the backward pass with a gradient (1 for a scalar); the sink receives every reached parameter once."""
        self._backward, self._last, delayed = True, last, list(self._delayed)
        intercepted = self if self._recomputes or self._delayed else nullcontext()
        try:
            with intercepted, torch.autograd.set_multithreading_enabled(False):
                if total.requires_grad and delayed and self.may_reenter:
                    opened(torch.autograd.backward)(total, gradient, retain_graph=not last)
                elif total.requires_grad:
                    gradients_at(total, [self.anchor], gradient, not last)
        finally:
            self._backward, self._collecting, self._delayed = False, True, delayed
        for name in list(self._pending):
            self._finish(name)

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
