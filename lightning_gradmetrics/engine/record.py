"""Recording every torch call of a forward pass, to learn how the model uses its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.calls import OpeningMode, tensors_in

__all__ = ["Record", "Recorder", "Seen"]


@dataclass(frozen=True)
class Seen:
    """A tensor at the time of a call: its serial number, its shape then, and whether a gradient flows into it."""

    serial: int
    shape: tuple[int, ...]
    requires_grad: bool


@dataclass(frozen=True)
class Record:
    """One call that returned tensors."""

    function: Callable[..., Any]
    inputs: tuple[Seen, ...]
    outputs: tuple[Seen, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    differentiable: bool


class Recorder(OpeningMode):
    """Records the calls made while it is active, of composite functions the calls inside.

    Args:
        parameters: The parameters to know by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.records: list[Record] = []
        self._serials: dict[int, int] = {}
        self._kept: list[Tensor] = []
        self.names = {self._see(parameter).serial: name for name, parameter in parameters.items()}

    def _see(self, tensor: Tensor) -> Seen:
        if id(tensor) not in self._serials:
            self._serials[id(tensor)] = len(self._kept)
            self._kept.append(tensor)
        return Seen(self._serials[id(tensor)], tuple(tensor.shape), tensor.requires_grad)

    def bytes(self) -> int:
        """The size of everything that was computed: at least what the forward pass keeps."""
        outputs = (tensor for record in self.records for tensor in tensors_in(record.result))
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in outputs}.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call and note what went in and what came out."""
        kwargs = kwargs or {}
        if self._opens(func):
            return self._inside(func, args, kwargs)
        inputs = tuple(self._see(tensor) for tensor in tensors_in((args, kwargs)))
        result = func(*args, **kwargs)
        outputs = tuple(self._see(tensor) for tensor in tensors_in(result))
        if outputs:
            # Reentrant checkpoints run without gradients here and once more in the backward pass.
            differentiable = not torch.is_grad_enabled() or any(seen.requires_grad for seen in outputs)
            self.records.append(Record(func, inputs, outputs, args, kwargs, result, differentiable))
        return result
