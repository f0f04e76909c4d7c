"""A compiled plan, and what its graph depends on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import tensors_in
from lightning_gradmetrics.classifier.preservation import ModelRecord
from lightning_gradmetrics.engine.inputs.samples import close_rows, input_shapes, input_structure
from lightning_gradmetrics.engine.passes.known_calls import KnownPath
from lightning_gradmetrics.engine.passes.path_check import forward_alone, logits_on_path
from lightning_gradmetrics.engine.passes.plan import PlanError
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.model_state import ForwardState, attribute_key
from lightning_gradmetrics.gradients.precision import allows_tf32
from lightning_gradmetrics.gradients.statistics import Moments

__all__ = [
    "OutOfRange",
    "Program",
    "ProgramState",
    "device_of",
    "has_hooks",
    "is_transformed",
    "logits_function",
    "settings_of",
]


class ProgramState:
    """The tensors of a batch and of its model, and everything else that a graph depends on.

    Args:
        task: The batch.

    Attributes:
        parameters: The model's parameters, each once, in the order of ``named_parameters``.
        buffers: The model's buffers, likewise.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._record = ModelRecord(task.model) if task.record is None else task.record
        self._numbers: dict[int, int] = {}
        self._modules: list[Hashable] = []
        self.parameters: list[Tensor] = []
        self.buffers: list[Tensor] = []
        for module in self._record.modules:
            self._modules.append((id(module), type(module), vars(module).get("forward"), has_hooks(module)))
            self._add(module._parameters, self.parameters)
            self._add(module._buffers, self.buffers)

    def _add(self, registered: Mapping[str, Tensor | None], tensors: list[Tensor]) -> None:
        for name, tensor in registered.items():
            if tensor is not None:
                number = self._numbers.setdefault(id(tensor), len(self._numbers))
                layout = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
                self._modules.append((name, number, layout, bool(tensor._backward_hooks)))
                if number == len(self.parameters) + len(self.buffers):
                    tensors.append(tensor)

    def key(self) -> Hashable:
        """Return everything that a graph depends on, except the values of tensors and the number of samples."""
        task = self._task
        strides = tuple(map(Tensor.stride, tensors_in(task.inputs)))
        labels = None if task.targets is None else (task.targets.dtype, task.targets.stride())
        options = (task.objectives, task.wanted, task.memory, settings_of(device_of(task)), labels)
        shapes = input_shapes(task)
        structure = (shapes, strides, task.per_sample, input_structure(task.inputs))
        attributes = attribute_key(task.model, self._record)
        return tuple(self._modules), attributes, tuple(task.parameters), structure, options

    def arguments(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor | None]:
        """Return the arguments of a graph: parameters, buffers, the model's inputs, and the labels."""
        parameters, buffers = list(map(Tensor.detach, self.parameters)), list(map(Tensor.detach, self.buffers))
        return parameters, buffers, list(tensors_in(self._task.inputs)), self._task.targets


class OutOfRange(Exception):
    """Squares of gradient entries overflow or vanish in single precision, so the batch runs eagerly."""


@dataclass(frozen=True)
class Program:
    """A compiled plan.

    Args:
        run: A function from parameters, buffers, inputs and labels to the moments of all objectives, in the order of
            ``keys``, the same merged over the parameters, and the logits.
        keys: The moments of one objective.
        size: The number of samples in the batch.
        logits: The function from the model's output to the logits.
        channels_last: Whether images use the channels-last layout.
        path: A number for the calls of the model's own forward pass of one sample.
        calls: These calls; ``None`` if they cannot be compared one by one.
        reads_range: Whether the function returns, before the logits, whether the sums of squares are in the range of single precision.
        turns: Counts the batches, so that each of them checks another sample.
    """

    run: Callable[..., Sequence[Tensor]]
    keys: tuple[Any, ...]
    size: int
    logits: Callable[[Any], Tensor]
    channels_last: bool
    path: int
    calls: KnownPath | None = None
    reads_range: bool = False
    turns: Iterator[int] = field(default_factory=itertools.count)

    def fits(self, task: Task) -> bool:
        """Return whether the program was made for batches of this size."""
        return self.size == task.size and self.logits == logits_function(task)

    def moments(
        self, task: Task, state: ProgramState, in_any_range: bool = False
    ) -> tuple[list[Moments], list[Moments], Tensor]:
        """Return the results of :meth:`run_on`, and compare the model with the graph.

        Raises:
            OutOfRange: See :meth:`run_on`.
            PlanError: If the model's own forward pass makes other calls, or returns other logits, than the graph.
        """
        with torch.no_grad(), _no_more_casts(device_of(task).type):
            moments, merged, logits = self.run_on(*state.arguments(), in_any_range)
        if hasattr(task.logits, "seen"):  # an observer that compares them with the logits of another forward pass
            task.logits.seen = logits
        else:
            self._check_forward(task, logits)
        return moments, merged, logits

    def run_on(
        self,
        parameters: list[Tensor],
        buffers: list[Tensor],
        inputs: list[Tensor],
        labels: Tensor | None,
        in_any_range: bool = False,
    ) -> tuple[list[Moments], list[Moments], Tensor]:
        """Return the results without comparing the model.

        Args:
            parameters: The model's parameters.
            buffers: The model's buffers.
            inputs: The model's inputs.
            labels: The labels, if there are any.
            in_any_range: Whether to return sums of squares of which some may be wrong; the caller compares them.

        Returns:
            The moments ``(N, P)`` of each objective, the same merged over the parameters, ``(N,)``, and the logits ``(N, C)``.

        Raises:
            OutOfRange: If squares of gradient entries overflow or may have vanished.
        """
        *values, logits = self.run(parameters, buffers, inputs, labels)
        is_in_range = not self.reads_range or bool(values.pop())
        if not (is_in_range or in_any_range):
            raise OutOfRange
        half = len(values) // 2
        return self._by_objective(values[:half]), self._by_objective(values[half:]), logits

    def _by_objective(self, values: Sequence[Tensor]) -> list[Moments]:
        count = len(self.keys)
        moments: list[Moments] = []
        for start in range(0, len(values), count):
            moments.append(dict(zip(self.keys, values[start : start + count], strict=True)))
        return moments

    def _check_forward(self, task: Task, logits: Tensor) -> None:
        """Compare one sample's logits with the model's, which may depend on state that the graph does not read.

        The calls of this sample's forward pass, with their constants, show a change that does not affect its logits.

        Raises:
            PlanError: If they differ.
        """
        laid_out = task.channels_last() if self.channels_last else task
        number, path = next(self.turns) % task.size, self.path
        alone = None if self.calls is None else logits_on_path(laid_out, number, self.calls)
        if alone is None:
            state = ForwardState(task.model, task.record)
            state.restore()
            alone, path, _ = forward_alone(laid_out, number, state)
        if path != self.path or not close_rows(alone, logits[number : number + 1]):
            ForwardState(task.model, task.record).restore()
            raise PlanError("its forward pass no longer computes what was compiled")


def settings_of(device: torch.device) -> Hashable:
    """Return the settings of torch that change the precision of kernels, or that a compiled graph contains."""
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    if device.type == "cuda":
        return autocast, allows_tf32(False), allows_tf32(True)
    return autocast, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()


def _no_more_casts(device: str) -> AbstractContextManager[Any]:
    """Return a block without autocast: a graph contains the casts of the model."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def device_of(task: Task) -> torch.device:
    """Return the device of the first chosen parameter."""
    return next(iter(task.parameters.values())).device


def is_transformed() -> bool:
    """Return whether a function of ``torch.func``, such as ``grad``, has called this one."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def logits_function(task: Task) -> Callable[[Any], Tensor]:
    """Return the function from outputs to logits, unwrapped if an observer wraps it."""
    function: Callable[[Any], Tensor] = getattr(task.logits, "logits_fn", task.logits)
    return function


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
