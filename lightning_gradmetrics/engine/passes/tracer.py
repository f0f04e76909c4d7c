"""Runs a model once and collects the uses of each chosen parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import _StopRecomputationError

from lightning_gradmetrics.engine.passes.collecting_pass import CollectingPass, Sink
from lightning_gradmetrics.engine.passes.copied_parameters import aligned_copies, broadcast_arguments, mapped_call
from lightning_gradmetrics.engine.passes.plan import Plan, PlanError, Source, Step
from lightning_gradmetrics.engine.passes.sorted_rows import GroupedProduct, LookUp, SortedCall
from lightning_gradmetrics.engine.rules import RULES, Call, Rule, bind
from lightning_gradmetrics.engine.tracing.axes import Axis, axis_of
from lightning_gradmetrics.engine.tracing.calls import (
    has_tensors,
    map_arguments,
    opened,
    sources_in,
    tensors_in,
)
from lightning_gradmetrics.engine.tracing.graph import Copies, saves_through_hooks

__all__ = ["Tracer"]


class Tracer(CollectingPass):
    """A forward pass that follows a plan: each call that involves a chosen parameter runs as its step of the plan says.

    The mode is active during the forward pass and, for activation checkpoints, the backward pass.

    Args:
        plan: The plan of the calls.
        parameters: The chosen parameters by name; they must not require gradients.
        size: The number of samples.
        sink: Called once per parameter and backward pass, as soon as the gradient of its last use arrives.
        free: Whether an axis with several positions per sample may have a different number than planned, as for
            sequences of a different length.
    """

    may_reenter = True
    """Whether reentrant activation checkpoints may start nested backward passes, which need a backward pass that adds to ``.grad``."""

    def __init__(self, plan: Plan, parameters: Mapping[str, Tensor], size: int, sink: Sink, free: bool = False) -> None:
        super().__init__(plan, parameters, size, sink)
        self.free, self.position = free, 0
        self._delayed: list[Step] = []
        self._recomputes = False

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

    def _run_backward(self, total: Tensor, gradient: Tensor | None, last: bool) -> None:
        """Run the backward pass; calls that a checkpoint repeats in it are those of planned steps."""
        delayed = list(self._delayed)
        intercepted = self if self._recomputes or delayed else nullcontext()
        try:
            with intercepted:
                if delayed and self.may_reenter:
                    opened(torch.autograd.backward)(total, gradient, retain_graph=not last)
                else:
                    super()._run_backward(total, gradient, last)
        finally:
            self._collecting, self._delayed = True, delayed
