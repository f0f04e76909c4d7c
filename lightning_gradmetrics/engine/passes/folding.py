"""Runs the layers of large batches in a cheaper way than the model does.

Batch norms are folded into the convolutions before them, so that a convolution returns the output of its norm. This saves the passes
over the norm's input. The model then has a tensor that does not hold the convolution's output, so nothing but the norm may use it. A call
that does is refused, and the plan runs without folds.

Images of models with group norms are laid out channels last at the first convolution, and group norms run in a kernel that is exact in
that layout. If the model fails with it, the plan runs in the model's own layout.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import _get_current_function_mode_stack

from lightning_gradmetrics.engine.passes.collecting_pass import Sink
from lightning_gradmetrics.engine.passes.plan import Fold, Plan, PlanError, Source, Step
from lightning_gradmetrics.engine.passes.shuffles import STRIDED, shuffled_images, shuffles_channels
from lightning_gradmetrics.engine.passes.tracer import Tracer
from lightning_gradmetrics.engine.rules import RULES, Call, Rule, bind
from lightning_gradmetrics.engine.rules.convolution import scaling_pays, weight_dominates
from lightning_gradmetrics.engine.rules.folded import FOLDED, run_folded
from lightning_gradmetrics.engine.rules.norm import channels_last_group_norm
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.axes import Axis
from lightning_gradmetrics.engine.tracing.calls import sources_in, tensors_in
from lightning_gradmetrics.engine.tracing.dependence import DependenceTrace
from lightning_gradmetrics.engine.tracing.trace import CallTrace, TracedCall
from lightning_gradmetrics.engine.uses import Use

__all__ = [
    "METADATA",
    "FoldRefused",
    "FoldingTracer",
    "can_lay_out",
    "find_folds",
    "folded_logits",
    "hidden_tensor",
    "result_in_layout",
]

CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


class FoldRefused(PlanError):
    """The model uses the output of a convolution that is folded with its batch norm, or insists on a layout."""


@dataclass
class _Folded:
    """A folded convolution in a forward pass.

    Args:
        fold: The fold.
        hidden: The tensor that the model has instead of the convolution's output, without values.
        output: The output of the norm.
        axis: Its sample axis.
        arguments: The other arguments of the norm that were used, by name.
        is_used: Whether the norm was called.
    """

    fold: Fold
    hidden: Tensor
    output: Tensor
    axis: Axis
    arguments: Mapping[str, Any]
    is_used: bool = False

    def references(self) -> int:
        """Return the number of references to the hidden tensor."""
        return sys.getrefcount(self.hidden)


# -- planning ---------------------------------------------------------------------------------------------------------


def find_folds(plan: Plan, trace: CallTrace, operations: DependenceTrace, task: Task) -> dict[int, Fold]:
    """Return the folds by the numbers of the convolutions' steps; none if a function mode of the caller sees the calls.

    Args:
        plan: The plan.
        trace: The trace that it was made from.
        operations: The operations of the same run.
        task: The samples of that run.
    """
    if _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
        return {}
    names = {id(parameter): name for name, parameter in task.parameters.items()}
    buffers = {id(buffer): name for name, buffer in task.model.named_buffers()}
    uses: Counter[int] = Counter()
    for operation in operations.operations:
        uses.update(operation.input_serials)
    made: dict[int, int] = {}
    folds: dict[int, Fold] = {}
    for number, (step, position) in enumerate(zip(plan.steps, plan.calls, strict=True)):
        call = trace.calls[position]
        if _is_convolution(step, call) and uses[operations.serial(call.result)] == 1:
            made[id(call.result)] = number
        elif _is_step_of(step, torch.batch_norm):
            values = bind(RULES[step.function], call.args, call.kwargs) or {}
            fold = _fold(number, values, names, buffers)
            if fold is not None and id(values["input"]) in made and step.sources == (fold.weight, fold.bias):
                folds[made[id(values["input"])]] = fold
    return folds


def can_lay_out(plan: Plan, trace: CallTrace, operations: DependenceTrace) -> bool:
    """Return whether images may be laid out channels last on a CPU although the model has group norms, or shuffles channels.

    Torch computes the variance of a group norm as ``E[x^2] - E[x]^2`` in that layout, so all of them must have rules.

    Args:
        plan: The plan.
        trace: The trace that it was made from.
        operations: The operations of the same run.
    """
    norms = convolutions = 0
    for step, position in zip(plan.steps, plan.calls, strict=True):
        call = trace.calls[position]
        if _is_step_of(step, torch.conv2d) and _is_convolution(step, call):
            convolutions += call.result.dtype is torch.float32
        elif _is_step_of(step, torch.group_norm) and len(step.sources) == 2:
            x = (bind(RULES[step.function], call.args, call.kwargs) or {})["input"]
            norms += x.is_cpu and x.is_contiguous() and all(isinstance(source, str) for source in step.sources)
    names = [operation.name for operation in operations.operations]
    if convolutions == 0 or norms != names.count("native_group_norm") or "as_strided" in names:
        return False
    return norms > 0 or shuffles_channels(trace)


def _is_step_of(step: Step, *functions: Any) -> bool:
    """Return whether a rule covers the step of a function whose tensors have the samples on the first axis, in the same layout."""
    axes = {axis for axis in (*step.inputs, step.output) if axis is not None}
    is_first = len(axes) == 1 and all(axis.dim == 0 for axis in axes)
    return step.kind == "rule" and step.function in functions and is_first


def _is_convolution(step: Step, call: TracedCall) -> bool:
    """Return whether a step is a convolution on the CPU whose weight is a parameter itself."""
    if not _is_step_of(step, *CONVOLUTIONS) or not all(isinstance(source, str) for source in step.sources):
        return False
    values = bind(RULES[step.function], call.args, call.kwargs) or {}
    constants = 1 + (values.get("bias") is not None) - len(step.sources)  # parameters that were not chosen
    return not constants and call.result.is_cpu and _share_type((call.args, call.kwargs, call.result))


def _share_type(value: Any) -> bool:
    """Return whether all tensors in a nested value are plain tensors of one type that the kernels support."""
    tensors = list(tensors_in(value))
    types = {tensor.dtype for tensor in tensors}
    return types in ({torch.float32}, {torch.float64}) and {*map(type, tensors)} <= {Tensor, nn.Parameter}


def _fold(number: int, values: Mapping[str, Any], names: Mapping[int, str], buffers: Mapping[int, str]) -> Fold | None:
    """Return the fold of a norm with its arguments; ``None`` if it has other arguments than parameters and running statistics."""
    found = [names.get(id(values.get(key))) for key in ("weight", "bias")]
    found += [buffers.get(id(values.get(key))) for key in ("running_mean", "running_var")]
    weight, bias, mean, variance = found
    if weight is None or bias is None or mean is None or variance is None or values.get("training"):
        return None
    if not _share_type(tuple(values.values())):
        return None
    return Fold(number, weight, bias, mean, variance, values["eps"])


# -- running ----------------------------------------------------------------------------------------------------------


def hidden_tensor(output: Tensor) -> Tensor:
    """Return the tensor that the model has instead of the output of a folded convolution.

    Code that no function mode sees, such as a scripted module or another thread, cannot mistake it for the output.
    """
    return torch.empty_like(output, device="meta", requires_grad=True)


def result_in_layout(function: Any, values: dict[str, Any]) -> Tensor | None:
    """Return the result of a layer of images in the channels-last layout; ``None`` for other layers.

    Args:
        function: The function of the layer.
        values: Its arguments by name; group norms add to them.

    Raises:
        FoldRefused: If no kernel covers a group norm.
    """
    x = values["input"]
    if x.ndim != 4:
        return None
    if function is torch.conv2d and x.is_contiguous() and not weight_dominates(values):
        output: Tensor = torch.conv2d(**{**values, "input": x.contiguous(memory_format=torch.channels_last)})
        return output
    if function is not torch.group_norm or x.is_contiguous():
        return None
    result = channels_last_group_norm(values)
    if result is None:
        raise FoldRefused("no kernel covers a group norm in this layout")
    return result


class FoldingTracer(Tracer):
    """A tracer that runs folded convolutions.

    Args:
        plan: The plan of the calls, with folds.
        task: The batch.
        sink: Called once per parameter and backward pass.
        free: Whether axes may have a different number of positions per sample than planned.

    Raises:
        FoldRefused: If the model uses the output of a folded convolution.
    """

    def __init__(self, plan: Plan, task: Task, sink: Sink, free: bool) -> None:
        super().__init__(plan, plan.known_parameters(task.model, task.parameters), task.size, sink, free)
        self._wanted = task.wanted
        self._buffers = dict(task.model.named_buffers())
        self._folded: dict[int, _Folded] = {}
        self._is_refused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call as :class:`Tracer` does; an operator of the dispatcher must not use a hidden tensor."""
        if type(func) is OpOverload and sources_in(self._folded, args, kwargs or {}):
            self._refuse()
        result = super().__torch_function__(func, types, args, kwargs)
        if type(result) is Tensor and result.is_meta and id(result) not in self._folded:
            self._refuse()  # it depends on a hidden tensor that was used out of sight
        return result

    def forward(self, task: Task) -> Tensor:
        """Return the logits.

        Raises:
            FoldRefused: If the model uses or stores a hidden tensor.
        """
        try:
            with self:
                logits = task.forward(self.plan.repairs_norms(task.size))
        except Exception as error:
            # The model may replace the error by another, or use a hidden tensor out of sight, which has no values.
            is_changed = bool(self._folded) or self.plan.lays_out
            if self._is_refused or (is_changed and not isinstance(error, PlanError)):
                self._refuse()
            raise
        unknown = _Folded(Fold(0, "", "", "", "", 0.0), torch.empty(0), logits, Axis(0), {})
        for folded in self._folded.values():
            if self._is_refused or not folded.is_used or folded.references() > unknown.references():
                self._refuse()
        self._folded.clear()
        return logits

    def _refuse(self) -> NoReturn:
        self._is_refused = True  # the model may catch the error
        raise FoldRefused("the model uses the output of a folded convolution, or fails in another layout")

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        uses = sources_in(self._folded, args, kwargs) if self._folded else ()
        if not uses:
            if self.plan.lays_out and func in STRIDED:
                self._refuse()
            shuffled = shuffled_images(func, args, kwargs) if self.plan.lays_out else None
            return super()._run(func, args, kwargs) if shuffled is None else shuffled
        if func is F.batch_norm and self._opens(func):
            return self._inside(func, args, kwargs)
        if func is torch.batch_norm and len(uses) == 1:
            return self._norm(uses[0], func, args, kwargs)
        if func not in METADATA:
            self._refuse()
        return func(uses[0].output, *args[1:], **kwargs)

    def _rule(self, step: Step, args: Any, kwargs: Any) -> Any:
        fold = self.plan.folds.get(self.position - 1)
        values = None if fold is None else bind(RULES[step.function], args, kwargs)
        if fold is None or not values or not self._runs_as_planned(fold, values):
            return self._unfolded(step, args, kwargs)
        assert step.output is not None
        axis = self._fitted(step.output, values["input"].shape)
        if scaling_pays(values, axis, self._wanted):
            return self._convolve(step, axis, fold, values)
        self.times.pop()  # the ordinary step notes it again
        return self._unfolded(step, args, kwargs)

    def _unfolded(self, step: Step, args: Any, kwargs: Any) -> Any:
        return super()._rule(step, args, kwargs)

    def _run_rule(self, step: Step, rule: Rule, values: dict[str, Any], args: Any, kwargs: Any) -> Tensor:
        result = self._in_layout(step, values)
        return super()._run_rule(step, rule, values, args, kwargs) if result is None else self._rooted(step, result)

    def _in_layout(self, step: Step, values: dict[str, Any]) -> Tensor | None:
        """Return the result of a layer of images in the channels-last layout; ``None`` for other layers."""
        if not self.plan.lays_out:
            return None
        try:
            return result_in_layout(step.function, values)
        except FoldRefused:
            self._refuse()

    def _runs_as_planned(self, fold: Fold, values: Mapping[str, Any]) -> bool:
        """Return whether a convolution runs as in the trace; a mode of the dispatcher in the model would see other operators."""
        x, weight = values["input"], values["weight"]
        if self._recomputes or torch.is_autocast_enabled("cpu") or x.dtype != weight.dtype:
            return False
        return not torch._C._len_torch_dispatch_stack() and self._buffers.keys() >= {fold.mean, fold.variance}

    def _convolve(self, step: Step, axis: Axis, fold: Fold, values: dict[str, Any]) -> Tensor:
        """Return a hidden tensor instead of the output of a convolution."""
        names = {"weight": fold.weight, "bias": fold.bias}
        arguments = {key: self.parameters[name] for key, name in names.items()}
        arguments["running_mean"], arguments["running_var"] = self._buffers[fold.mean], self._buffers[fold.variance]
        slots = self._slots(values) | {f"norm_{key}": name for key, name in names.items()}
        if self.recorder is not None:
            self.recorder.note_fold(self.outline, self.position - 1, step, axis, fold, slots, arguments)
        output = self._rooted(step, run_folded(step.function, values, arguments, fold.eps))
        self._collect_at(output, axis, values, slots)
        self._fitted(axis, output.shape)
        hidden = hidden_tensor(output)
        self._folded[id(hidden)] = _Folded(fold, hidden, output, axis, arguments)
        return hidden

    def _collect_at(self, output: Tensor, axis: Axis, values: dict[str, Any], slots: Mapping[str, Source]) -> None:
        """Collect the uses of a folded layer when the gradient of its output arrives."""
        for source in slots.values():
            self._expect(source)
        call = Call(values, axis, axis, frozenset(slots))
        hook = partial(self._rule_gradient, FOLDED, call, slots, values["input"]._version)
        output.register_hook(hook)  # type: ignore[no-untyped-call]

    def _norm(self, folded: _Folded, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Return the output of the norm after a folded convolution."""
        values = bind(RULES[func], args, kwargs) or {}
        is_next = self.position == folded.fold.norm and torch.is_grad_enabled()
        is_same = all(values.get(name) is tensor for name, tensor in folded.arguments.items())
        is_known = is_next and is_same and not folded.is_used
        if not is_known or values["training"] or values["eps"] != folded.fold.eps:
            self._refuse()
        self.position += 1
        self.times += [folded.axis.times, folded.axis.times]
        folded.is_used = True
        return folded.output


class _PlainTracer(FoldingTracer):
    """Runs the same forward pass and collects nothing, so that autograd differentiates it."""

    _derive = _broadcast = _vmap = _uncovered = Tracer._plain

    def _unfolded(self, step: Step, args: Any, kwargs: Any) -> Any:
        rule = RULES[step.function]
        values = bind(rule, args, kwargs) or {}
        result = self._in_layout(step, values)
        if result is not None:
            return result
        args, kwargs = rule.made_dense(values, args, kwargs)  # another layout rounds differently
        return step.function(*args, **kwargs)

    def _rooted(self, step: Step, result: Tensor) -> Tensor:
        return result

    def _collect_at(self, output: Tensor, axis: Axis, values: dict[str, Any], slots: Mapping[str, Source]) -> None:
        pass


def folded_logits(plan: Plan, task: Task) -> Tensor:
    """Return the logits with their graph, by a forward pass with the same rounding as that of :class:`FoldingTracer`.

    Args:
        plan: The plan, with folds.
        task: The batch, whose parameters require gradients.
    """

    def ignore(name: str, use: Use) -> None:
        pass

    return _PlainTracer(plan, task, ignore, False).forward(task)


def _metadata() -> frozenset[Any]:
    """Return the functions of a tensor that do not depend on its values."""
    getters = ("shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad")
    functions = [getattr(Tensor, name).__get__ for name in getters]
    functions += [Tensor.dim, Tensor.size, Tensor.numel, Tensor.__len__, Tensor.is_contiguous, Tensor.is_floating_point]
    return frozenset(functions)


METADATA = _metadata()
"""Functions that may be called with a hidden tensor."""
