"""Restores a model and torch's random number generators after use."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import is_
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.model_layout import layout_of
from lightning_gradmetrics.classifier.tensor_records import (
    MemoryRecord,
    TensorRecord,
    TensorRecords,
    note_open,
    warn_of_late_writes,
    with_read_gradients,
    written_among,
)

__all__ = ["ModelRecord", "RandomState", "exclusive", "preserved"]

_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_GRADIENT = Tensor.grad.__get__  # type: ignore[union-attr]

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_GUARD = threading.Lock()


@contextmanager
def preserved(model: nn.Module) -> Iterator[ModelRecord]:
    """Restore the model and the random number generators at the end of the block, also after an exception.

    Restored are:

    - each parameter's ``requires_grad`` and ``.grad``, which is ``None`` inside the block unless a forward pass reads it, and each
      module's train or eval mode;
    - which tensors are parameters and buffers, which modules are submodules, and the values of all buffers: batch norm
      changes its statistics without a new version of the tensor;
    - attributes that a forward pass sets, replaces or deletes, including the entries of containers, nested ones too, the
      attributes of configurations and namespaces, and the values of arrays and tensors;
    - parameters whose ``.data`` a forward pass replaces, and those that it changes in place: the weights of embeddings with
      ``max_norm``, and those of which the first forward pass shows it. Other parameters are not copied;
    - hooks of modules, because transformers adds some in a forward pass that returns hidden states;
    - the random number generators, see :class:`RandomState`.

    A second thread that enters with the same model waits for the first one. The block gets the record of that state.
    """
    with exclusive(model):
        record = ModelRecord(model)
        try:
            record.hide_gradients()
            yield record
        finally:
            record.restore()


class RandomState:
    """The state of torch's CPU generator and of the generators of the model's CUDA devices.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        devices: set[torch.device] = set()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        self._cuda = [(device, torch.cuda.get_rng_state(device)) for device in devices]
        self._cpu = torch.random.get_rng_state()

    def is_current(self) -> bool:
        """Return whether the generators are still in the recorded state, so nothing has drawn from them."""
        for device, state in self._cuda:
            if not torch.equal(torch.cuda.get_rng_state(device), state):
                return False
        return torch.equal(torch.random.get_rng_state(), self._cpu)

    def restore(self) -> None:
        """Set the generators to the recorded state."""
        for device, state in self._cuda:
            torch.cuda.set_rng_state(state, device)
        torch.random.set_rng_state(self._cpu)


def exclusive(model: nn.Module) -> threading.RLock:
    """Return the lock of a model, which one thread can take repeatedly."""
    lock = _LOCKS.get(model)
    if lock is None:
        with _GUARD:
            lock = _LOCKS.setdefault(model, threading.RLock())
    return lock


class ModelRecord:
    """The state of a model and of the random number generators at one moment.

    Args:
        model: The model.

    Attributes:
        layout: The modules, attributes, hooks and registered tensors.
        modules: The modules of the model.
        parameters: All registered parameters.
        added: Once the state is restored, the names of the parameters that forward passes had registered.
    """

    added: Sequence[str] = ()

    def __init__(self, model: nn.Module) -> None:
        self.layout = layout_of(model)
        self.modules, self.parameters = self.layout.modules, self.layout.parameters
        self._flags = list(map(_REQUIRES_GRAD, self.parameters))
        self._gradients = list(map(_GRADIENT, self.parameters))
        self.generators = RandomState(model)
        self._memory = MemoryRecord(self.layout.ordinary_parameters)
        self._values = TensorRecords(self.tensors())
        self._written = list(map(TensorRecord, written_among(self.parameters)))
        self._shown: dict[int, tuple[Tensor, Tensor, TensorRecord]] = {}
        for parameter in with_read_gradients(self.parameters):
            self.show_gradient(parameter)
        note_open(model, self)

    def note_written(self, tensor: Tensor) -> None:
        """Store the values of a parameter before it is changed in place; those of buffers and attributes are stored already."""
        if any(map(partial(is_, tensor), self.parameters)):
            self._written.append(TensorRecord(tensor))

    @property
    def has_attribute_tensors(self) -> bool:
        """Whether attributes contain tensors that are neither parameters nor buffers."""
        return bool(self.layout.tensors)

    def tensors(self) -> list[Tensor]:
        """Return the buffers and the tensors among the attributes, in a fixed order."""
        return [*self.layout.buffers, *self.layout.tensors]

    def hide_gradients(self) -> None:
        """Set each ``.grad`` to ``None``: a forward pass may zero it, convert it or add to it, and nothing is copied.

        Only those that forward passes read stay, and are copied.
        """
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            if gradient is None or gradient.dtype is not parameter.dtype:  # others could not be assigned again
                continue
            if id(parameter) not in self._shown:
                parameter.grad = None

    def show_gradient(self, parameter: Tensor) -> None:
        """Set the ``.grad`` of a parameter to that of this state, and store its values."""
        if id(parameter) in self._shown:
            return
        for other, gradient in zip(self.parameters, self._gradients, strict=True):
            if other is parameter and gradient is not None:
                parameter.grad = gradient
                self._shown[id(parameter)] = parameter, gradient, TensorRecord(gradient)

    def restore(self) -> None:
        """Set everything to this state."""
        warn_of_late_writes(self.modules[0], self._late_writes())
        self._restore_parameters()  # a gradient can only be assigned to a parameter of its type
        self._restore_flags()
        if not self.layout.is_current():
            self.added = self.layout.restore_registered()
            self.layout.restore()
        self._values.restore()
        self.generators.restore()

    def _restore_flags(self) -> None:
        """Set which parameters require gradients, and the gradients, to this state."""
        if list(map(_REQUIRES_GRAD, self.parameters)) != self._flags:
            for parameter, requires_grad in zip(self.parameters, self._flags, strict=True):
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
        if not all(map(is_, map(_GRADIENT, self.parameters), self._gradients)):
            for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
                if parameter.grad is not gradient:
                    parameter.grad = gradient

    def _late_writes(self) -> list[Tensor]:
        """Return the parameters that were changed in place and of which there are no copies."""
        late = self._memory.written()
        if not late:
            return []
        copied = set(map(id, self.layout.tensors))
        copied.update(id(record.tensor) for record in self._written)
        return [tensor for tensor in late if id(tensor) not in copied]

    def restore_for_forward(self) -> None:
        """Set the attributes, hooks, and the changed values of tensors to this state, but not the generators."""
        if not self.layout.is_current():
            self.layout.restore()
        self.restore_tensors()

    def restore_tensors(self) -> None:
        """Set the parameters, buffers and tensors that a forward pass has replaced or changed in place to this state."""
        self._restore_parameters()
        self._values.restore_if_changed()

    def _restore_parameters(self) -> None:
        """Set the values of parameters that a forward pass has replaced or changed in place to this state, and gradients it reads."""
        self._memory.restore()
        for written in self._written:
            written.restore()
        for parameter, gradient, record in self._shown.values():
            record.restore()
            if parameter.grad is not gradient:
                parameter.grad = gradient
