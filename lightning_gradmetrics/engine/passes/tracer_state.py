"""What a tracer notes during a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_gradmetrics.engine.passes.path_record import PathRecorder
from lightning_gradmetrics.engine.passes.plan import Plan, PlanError, Source, Step
from lightning_gradmetrics.engine.passes.sorted_rows import SortWatch
from lightning_gradmetrics.engine.rules import RULES, bind
from lightning_gradmetrics.engine.tracing.calls import OpeningMode, map_arguments
from lightning_gradmetrics.engine.tracing.graph import with_graph
from lightning_gradmetrics.engine.tracing.host_reads import READING, ReadWatch, tensors_read
from lightning_gradmetrics.engine.tracing.masks import MaskWatch, selecting_mask
from lightning_gradmetrics.engine.tracing.outline import Outline
from lightning_gradmetrics.engine.tracing.sorts import GROUPED_PRODUCTS

__all__ = ["TracerState"]

_BATCH_NORM = F.batch_norm if F.batch_norm.__code__.co_filename == F.__file__ else None
"""Torch's own function; ``None`` if another library has replaced it."""


class TracerState(OpeningMode):
    """What a forward pass notes of its calls. Each note is made when it is first used, because a known path needs few of them.

    Args:
        plan: The plan of the calls.
        parameters: The chosen parameters by name.
        size: The number of samples.
    """

    def __init__(self, plan: Plan, parameters: Mapping[str, Tensor], size: int) -> None:
        super().__init__()
        self.plan, self.parameters, self.size = plan, parameters, size
        self.recorder: PathRecorder | None = None
        self.whole = GROUPED_PRODUCTS if plan.sorts else frozenset()
        self.device = next(iter(parameters.values())).device

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one call as planned."""
        raise NotImplementedError

    def _inside(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Return the function's result, with the calls inside it intercepted; that of a batch norm is made directly."""
        arguments = None
        if self.recorder is None and function is _BATCH_NORM:
            arguments = _batch_norm_arguments(*args, **kwargs)
        if arguments is None:
            return super()._inside(function, args, kwargs)
        self._open.append(function)
        try:
            return self._run(torch.batch_norm, arguments, {})
        finally:
            self._open.pop()

    def _cut(self, arguments: Any) -> Any:
        """Return the arguments without the graphs of derived tensors."""
        return map_arguments(self._detached, arguments)

    def _detached(self, tensor: Tensor) -> Tensor:
        return tensor.detach() if id(tensor) in self._tracked and tensor.requires_grad else tensor

    def _slots(self, values: Mapping[str, Any]) -> dict[str, Source]:
        """Return the chosen parameters and derived tensors among a rule's arguments by their names."""
        slots = {}
        for name, value in values.items():
            source = self._tracked.get(id(value))
            if source is not None:
                slots[name] = source
        return slots

    def _constant(self, values: Mapping[str, Any]) -> bool:
        """Return whether the input is the call's only tensor with a graph."""
        return not any(name != "input" and isinstance(t, Tensor) and t.requires_grad for name, t in values.items())

    def _rooted(self, step: Step, result: Tensor) -> Tensor:
        if torch._C._functorch.is_functorch_wrapped_tensor(result):
            raise PlanError("a call of torch.func, such as vmap, contains it")
        return with_graph(result, self.anchor)

    def _compare_mask(self, func: Any, args: Any) -> None:
        """Compare a mask that selects rows with the plan: it must select the same number of rows of each sample."""
        mask = selecting_mask(func, args)
        if mask is None:
            return
        if not self.masks.matches(mask):
            raise PlanError("a mask does not select the planned number of rows of each sample")
        if self.recorder is not None:
            self.recorder.note_mask(self.masks.last)

    def _watch_reads(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Compare a value that Python reads with the planned one: the model may branch on it."""
        if self.plan.sorts and not self._open:
            self.sorts.add(func, args, result)
            if func in GROUPED_PRODUCTS:
                self.sorts.owners_in_groups(bind(RULES[func], args, kwargs) or {})
        if type(result) is Tensor and result.ndim and getattr(func, "__name__", "") not in READING:
            return
        read, value = tensors_read(func, args, kwargs, result)
        if not read:
            self.reads.reductions.add(func, args, result)
        for tensor in read:
            if not self.reads.matches(value, self.reads.reductions.of_read(func, args, tensor, result)):
                raise PlanError("Python reads a different value from a tensor than planned")

    def require_masks(self) -> None:
        """Require that all planned masks and groups of rows were compared.

        Raises:
            PlanError: If they were not.
        """
        if self.plan.masks and self.masks.seen != len(self.plan.masks):
            raise PlanError("the model selects rows by other masks than planned")
        if self.plan.sorts:
            self.sorts.require_all()

    @cached_property
    def outline(self) -> Outline:
        """The calls."""
        return Outline()

    @cached_property
    def reads(self) -> ReadWatch:
        """What Python reads from tensors."""
        return ReadWatch(self.plan.reads, self.size)

    @cached_property
    def masks(self) -> MaskWatch:
        """The masks that select rows."""
        return MaskWatch(self.plan.masks, self.size)

    @cached_property
    def sorts(self) -> SortWatch:
        """The sorts, and the groups of sorted rows."""
        return SortWatch(self.plan.sorts, self.size)

    @cached_property
    def anchor(self) -> Tensor:
        """A leaf at which the graphs of all uses of parameters end."""
        return torch.zeros((), device=self.device, requires_grad=True)

    @cached_property
    def _tracked(self) -> dict[int, Source]:
        """The chosen parameters, and tensors derived from them, by the identity of the tensor."""
        return {id(parameter): name for name, parameter in self.parameters.items()}

    @cached_property
    def _roots(self) -> dict[Source, tuple[str, ...]]:
        """The parameters behind each source."""
        return {name: (name,) for name in self.parameters}


def _batch_norm_arguments(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Any, ...] | None:
    """Return the arguments with which :func:`torch.nn.functional.batch_norm` calls ``torch.batch_norm``; ``None`` in training."""
    if training:
        return None
    statistics = running_mean, running_var, training, momentum, eps, torch.backends.cudnn.enabled
    return input, weight, bias, *statistics
