"""Traces every torch call of a forward pass, to determine how the model uses its parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lightning_gradmetrics.classifier.tensor_records import version_of
from lightning_gradmetrics.engine.tracing.axes import axis_between
from lightning_gradmetrics.engine.tracing.calls import OpeningMode, tensors_in
from lightning_gradmetrics.engine.tracing.host_reads import HostRead, Reductions, host_value, tensors_read
from lightning_gradmetrics.engine.tracing.masks import selecting_mask
from lightning_gradmetrics.engine.tracing.sorts import GROUPED_PRODUCTS, SortedKeys, keys_of_sort
from lightning_gradmetrics.gradients.precision import at_least_float32

__all__ = ["CallTrace", "TensorState", "TracedCall"]


class TensorState(NamedTuple):
    """A tensor during a call: its serial number, its shape, whether it requires a gradient, and its version if it does."""

    serial: int
    shape: tuple[int, ...]
    requires_grad: bool
    version: int = 0


class TracedCall(NamedTuple):
    """One call that returned tensors.

    Args:
        function: The function.
        inputs: Its tensor arguments.
        outputs: The tensors that it returned.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        result: The returned value.
        differentiable: Whether a gradient flows through it.
        marks: For each tensor argument and then each output, a checksum of each position on its sample axis; ``None``
            if there is no sample axis or no guide.
    """

    function: Callable[..., Any]
    inputs: tuple[TensorState, ...]
    outputs: tuple[TensorState, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    differentiable: bool
    marks: tuple[Tensor | None, ...] = ()


class CallTrace(OpeningMode):
    """Traces the calls made while it is active; for composite functions, the calls inside.

    Args:
        parameters: The parameters by name.
        guide: A trace with a different number of samples, which reveals the sample axes; calls are marked only with a
            guide.
        only: The numbers of the calls to mark; ``None`` marks all.
        keep: Whether to keep arguments and results.
        on_read: Called with each tensor whose values Python reads.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        guide: Sequence[TracedCall] | None = None,
        only: Collection[int] | None = None,
        keep: bool = True,
        on_read: Callable[[Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self._on_read = on_read
        self.watched, self.where = -1, ""
        self.pauses_gradients = False
        self.calls: list[TracedCall] = []
        self.reads: list[HostRead] = []
        self.masks: list[Tensor] = []
        self.sorts: list[SortedKeys] = []
        self.groups = 0
        self.assigned: list[TensorState] = []
        self._reductions = Reductions()
        self._guide, self._only, self._keep = guide, only, keep
        self._serials: dict[int, int] = {}
        self._tensors: list[Tensor] = []
        self.parameters = parameters
        self.names = {self._state(parameter).serial: name for name, parameter in parameters.items()}

    def _state(self, tensor: Tensor) -> TensorState:
        serial = self._serials.get(id(tensor))
        if serial is None:
            serial = self._serials[id(tensor)] = len(self._tensors)
            self._tensors.append(tensor)
        requires_grad = tensor.requires_grad
        return TensorState(serial, tensor.shape, requires_grad, version_of(tensor) if requires_grad else 0)

    def bytes(self) -> int:
        """Return the size of all computed tensors, an upper bound of the memory that the forward pass keeps."""
        sizes: dict[int, int] = {}
        for call in self.calls:
            for tensor in tensors_in(call.result):
                if tensor.layout == torch.strided:
                    storage = tensor.untyped_storage()
                    sizes[storage.data_ptr()] = storage.nbytes()
        return sum(sizes.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call and record its inputs and outputs."""
        kwargs = kwargs or {}
        if self._opens(func):
            return self._inside(func, args, kwargs)
        if len(self.calls) == self.watched:
            self.where = _surrounding_module() or self.where
        tensors = list(tensors_in((args, kwargs)))
        inputs = tuple(map(self._state, tensors))
        before = self._marks(tensors, inputs, 0)
        result = func(*args, **kwargs)
        mask, keys = selecting_mask(func, args), None if self._open else keys_of_sort(func, args, result)
        if mask is not None:
            self.masks.append(mask)
        if keys is not None:
            self.sorts.append(keys)
        self.groups += func in GROUPED_PRODUCTS and not self._open
        read, value = tensors_read(func, args, kwargs, result)
        for tensor in read:
            reduction = self._reductions.of_read(func, args, tensor, result)
            self.reads.append(HostRead(host_value(value), len(self.calls), tensor, reduction))
            if self._on_read is not None:
                self._on_read(tensor)
        if not read:
            self._reductions.add(func, args, result)
        if result is None:  # as for ``x[0] = y``
            self.assigned += inputs[1:]
        results = list(tensors_in(result))
        outputs = tuple(map(self._state, results))
        if outputs:
            # Reentrant checkpoints run without gradients here and once more in the backward pass; a new tensor has no gradient.
            self.pauses_gradients = self.pauses_gradients or (bool(inputs) and not torch.is_grad_enabled())
            differentiable = not torch.is_grad_enabled() or any(state.requires_grad for state in outputs)
            marks = (*before, *self._marks(results, outputs, len(inputs)))
            call = TracedCall(func, inputs, outputs, args, kwargs, result, differentiable, marks)
            self.calls.append(call if self._keep else call._replace(args=(), kwargs={}, result=None))
        return result

    def _marks(self, tensors: Sequence[Tensor], states: Sequence[TensorState], first: int) -> tuple[Tensor | None, ...]:
        """Return the marks of a call's tensors; ``first`` is the position of their states in the guide."""
        number = len(self.calls)
        if self._guide is None or number >= len(self._guide) or (self._only is not None and number not in self._only):
            return (None,) * len(tensors)
        guide = self._guide[number]
        shapes = [state.shape for state in (*guide.inputs, *guide.outputs)]
        marks = []
        with torch._C.DisableTorchFunction(), torch.no_grad(), _disable_current_modes():
            for number, (tensor, state) in enumerate(zip(tensors, states, strict=True), first):
                shape = shapes[number] if number < len(shapes) else state.shape
                marks.append(_marked(tensor, state.shape, shape))
        return tuple(marks)


def _surrounding_module() -> str:
    """Return the innermost module whose forward pass is running."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            return type(module).__name__
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _marked(tensor: Tensor, shape: tuple[int, ...], other: tuple[int, ...]) -> Tensor | None:
    """Return one number for each position on the sample axis, a weighted sum of the entries there."""
    try:
        axis = axis_between(other, shape)
    except ValueError:
        return None
    if axis is None or tensor.layout != torch.strided or tensor.is_quantized or not tensor.numel():
        return None
    rows = tensor.detach().movedim(axis.dim, 0).reshape(shape[axis.dim], -1)
    if rows.is_complex():
        rows = rows.abs()
    elif not rows.is_floating_point():
        rows = rows.float()
    rows = at_least_float32(rows)
    weights = torch.arange(1, rows.shape[1] + 1, dtype=rows.dtype, device=rows.device).sin_().add_(2)
    return rows.nan_to_num(1e3, 2e3, -2e3) @ weights
