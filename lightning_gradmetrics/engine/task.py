"""The task of an engine: one batch, its objectives, parameters and moments."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import Inputs, as_rows, call, map_tensors, tensors_in
from lightning_gradmetrics.classifier.norm_gradients import exact_norm_gradients
from lightning_gradmetrics.classifier.preservation import ModelRecord
from lightning_gradmetrics.classifier.tensor_records import version_of
from lightning_gradmetrics.engine.kernels import class_residuals
from lightning_gradmetrics.engine.refusals import list_of_samples, no_gradient, no_real_logits, rows_not_samples
from lightning_gradmetrics.engine.uses import merge_rows
from lightning_gradmetrics.gradients.objectives import Loss, Objective
from lightning_gradmetrics.gradients.scaling import unit_gradient, unit_losses
from lightning_gradmetrics.gradients.statistics import Moment, Moments, accumulator

if TYPE_CHECKING:
    from lightning_gradmetrics.engine.inputs.assumption import Assumption

__all__ = ["Task", "empty_moments", "joined"]


@dataclass(frozen=True)
class Task:
    """One batch to compute; gradients are enabled, no tensor is an inference tensor, and the model is preserved.

    Args:
        model: The model.
        inputs: Its inputs, ``size`` samples along the first axis of each tensor.
        size: Number of samples ``N``.
        objectives: The objectives.
        targets: True labels ``(N,)``, if there are any.
        parameters: The chosen parameters by name, in the order of the result's columns.
        wanted: The moments to compute.
        logits: Returns the logits ``(N, C)`` from the model's output.
        memory: Memory limit in bytes, beyond the model and the inputs; ``None`` for no limit.
        per_sample: For each tensor of the inputs, whether its first axis is the sample; other tensors are shared.
        assumption: Confirms or replaces ``per_sample``, if it is only assumed.
        record: The model's state when the task was made, if the model is still in it.
        merged: Whether the result may be the moments over all parameters, ``(N,)``.
        weights: Powers of two ``(N,)`` by which the gradients of the samples are scaled until the end, for a check.
    """

    model: nn.Module
    inputs: Inputs
    size: int
    objectives: tuple[Objective, ...]
    targets: Tensor | None
    parameters: Mapping[str, nn.Parameter]
    wanted: frozenset[Moment]
    logits: Callable[[Any], Tensor]
    memory: int | None = None
    per_sample: tuple[bool, ...] = ()
    assumption: Assumption | None = None
    record: ModelRecord | None = None
    merged: bool = False
    weights: Tensor | None = None

    @property
    def losses(self) -> tuple[Callable[[Tensor | None], Loss], ...]:
        """For each objective, a function from the true labels (or ``None``) to the loss on logits."""
        return tuple(objective.loss for objective in self.objectives)

    @property
    def all_parameters(self) -> Iterable[nn.Parameter]:
        """All registered parameters of the model, chosen or not."""
        return self.model.parameters() if self.record is None else self.record.parameters

    def leaves(self) -> dict[int, tuple[str, int, int]]:
        """Return a kind, a number and the version of each input, parameter and buffer by the identity of the tensor.

        Kinds and numbers are the same in every batch.
        """
        leaves: dict[int, tuple[str, int, int]] = {}
        buffers = self.model.buffers() if self.record is None else self.record.tensors()
        every = ("input", tensors_in(self.inputs)), ("parameter", self.all_parameters), ("buffer", buffers)
        for kind, tensors in every:
            for tensor in tensors:
                leaves.setdefault(id(tensor), (kind, len(leaves), version_of(tensor)))
        return leaves

    def decided(self) -> Task:
        """Return the task with ``per_sample`` as runs of the model show it, if it is only assumed.

        Raises:
            SampleAxisError: If an input is ambiguous, or the model fails for every choice of the shared tensors.
        """
        if self.assumption is None:
            return self
        return replace(self, per_sample=self.assumption.decide(), assumption=None)

    def rows(self, start: int, stop: int) -> Task:
        """Return the same task for the samples ``start`` to ``stop``."""
        return self._take(slice(start, stop), len(range(self.size)[start:stop]))

    def picked(self, samples: Sequence[int]) -> Task:
        """Return the same task for the samples with these numbers, repeats allowed."""
        return self._take(list(samples), len(samples))

    def _take(self, index: slice | list[int], size: int) -> Task:
        targets = None if self.targets is None else _rows(self.targets, index)
        return replace(self, inputs=self.inputs_at(index), size=size, targets=targets)

    def inputs_at(self, index: slice | list[int]) -> Any:
        """Return the inputs of some samples."""
        flags = iter(self.per_sample)

        def take(tensor: Tensor) -> Tensor:
            return _rows(tensor, index) if next(flags) else tensor

        return map_tensors(self.inputs, take)

    def restricted(self, names: Collection[str]) -> Task:
        """Return the same task for some of its parameters."""
        if len(names) == len(self.parameters) and self.parameters.keys() <= set(names):
            return self
        parameters = {}
        for name, parameter in self.parameters.items():
            if name in names:
                parameters[name] = parameter
        return replace(self, parameters=parameters)

    def channels_last(self) -> Task:
        """Return the task with images in the channels-last layout."""

        def laid_out(tensor: Tensor) -> Tensor:
            return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

        return replace(self, inputs=map_tensors(self.inputs, laid_out))

    def forward(self, repairs_norms: bool = True) -> Tensor:
        """Return the model's logits ``(N, C)``.

        Norms are repaired by a function mode, in which compiled functions do not run compiled. Without gradients there is none.

        Args:
            repairs_norms: Whether norms may get gradients with unusual strides in a backward pass that follows.

        Raises:
            SampleAxisError: If the logits do not have one row per sample.
        """
        if not repairs_norms or not torch.is_grad_enabled():
            return self.logits_of(self.inputs, self.size)
        with exact_norm_gradients(self.size):
            return self.logits_of(self.inputs, self.size)

    def logits_of(self, inputs: Any, size: int) -> Tensor:
        """Return the model's logits ``(size, C)`` of other inputs; those of one sample may be ``(C,)``.

        Raises:
            SampleAxisError: If the logits do not have one row per sample.
            ValueError: If they were computed in inference mode, or are no real numbers.
        """
        logits = self.logits(call(self.model, inputs))
        if not isinstance(logits, Tensor):
            raise TypeError(f"logits= must return a tensor (N, C), got a {type(logits).__name__}")
        with torch._C.DisableTorchFunction():
            shape = tuple(logits.shape)
            if logits.is_inference() or not logits.is_floating_point():
                raise no_gradient(self.model) if logits.is_inference() else no_real_logits(logits.dtype)
        if size == 1 and len(shape) == 1:
            return as_rows(logits)
        if len(shape) != 2 or shape[0] != size:
            is_listed = len(shape) == 2 and _has_list(inputs, shape[0])
            raise list_of_samples(shape[0]) if is_listed else rows_not_samples(shape, size)
        return logits

    def loss(self, index: int, logits: Tensor) -> Tensor:
        """Return the losses ``(N,)`` of one objective."""
        return self.losses[index](self.targets)(logits)

    def unit_gradient(self, index: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of :meth:`unit_losses` with respect to the logits, ``(N, C)``, and the undoing factors."""
        gradient, undo = self._unit_gradient(index, logits)
        if self.weights is None:
            return gradient, undo
        return gradient * self.weights[:, None].to(gradient), undo / self.weights.to(undo)

    def _unit_gradient(self, index: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        objective, labels = self.objectives[index], None
        is_plain = objective.function is None and not objective.arguments
        if objective.name == "label":
            labels = self.targets
        if is_plain and (objective.name == "pseudo_label" or labels is not None):
            residuals = class_residuals(logits.detach(), labels)
            if residuals is not None:
                return residuals
        return unit_gradient(objective, self.targets, logits)

    def unit_losses(self, index: int, logits: Tensor, only_tiny: bool = False) -> tuple[Tensor, Tensor]:
        """Return losses ``(N,)`` whose gradients are scaled by a power of two per sample, and the factors that undo it."""
        return unit_losses(self.losses[index](self.targets), logits, only_tiny)


def _has_list(inputs: Any, count: int) -> bool:
    """Return whether the inputs contain a list of as many tensors."""
    if isinstance(inputs, Mapping):
        return any(map(partial(_has_list, count=count), inputs.values()))
    if not isinstance(inputs, (list, tuple)):
        return False
    are_tensors = [isinstance(value, Tensor) for value in inputs]
    return (len(are_tensors) == count and all(are_tensors)) or any(map(partial(_has_list, count=count), inputs))


def _rows(tensor: Tensor, index: slice | list[int]) -> Tensor:
    """Return some rows: a view for a slice, otherwise a copy. A list of numbers is copied to the device, which waits for it."""
    if isinstance(index, list) and len(index) == 1:
        return tensor[index[0] : index[0] + 1].clone()
    return tensor[index]


def empty_moments(task: Task, size: int = 0) -> list[Moments]:
    """Return moments of all-zero gradients, ``(size, P)`` for each objective."""
    parameter = next(iter(task.parameters.values()))
    shape = (size, len(task.parameters))
    dtype, device = accumulator(parameter), parameter.device
    moments: list[Moments] = []
    for _ in task.losses:
        moments.append({key: torch.zeros(shape, dtype=dtype, device=device) for key in task.wanted})
    return moments


def joined(parts: Sequence[list[Moments]]) -> list[Moments]:
    """Return the moments of all samples for each objective, from the moments of consecutive groups."""
    return list(map(merge_rows, zip(*parts, strict=True)))
