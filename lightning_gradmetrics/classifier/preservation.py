"""Restores a model and torch's random number generators after use."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.large_parts import ArrayRecord
from lightning_gradmetrics.classifier.mutable_parts import ContainerRecord, mutable_parts
from lightning_gradmetrics.classifier.tensor_records import (
    MemoryRecord,
    TensorRecord,
    TensorRecords,
    is_ordinary,
    is_written,
    note_open,
    warn_of_late_writes,
)

__all__ = ["HookState", "ModelRecord", "RandomState", "exclusive", "modules_of", "named_parameters", "preserved"]

INTERNAL = frozenset(vars(nn.Module()))
"""Attributes of every module."""

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
"""Attributes of a module that contain its hooks."""

_UNCHANGEABLE = frozenset([bool, int, float, str, type(None)])
"""Types whose values a forward pass can replace, but not change."""

CONTAINERS = (dict, OrderedDict, list, set)

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_GUARD = threading.Lock()


@contextmanager
def preserved(model: nn.Module) -> Iterator[ModelRecord]:
    """Restore the model and the random number generators at the end of the block, also after an exception.

    Restored are:

    - each parameter's ``requires_grad`` and ``.grad``, and each module's train or eval mode;
    - which tensors are parameters and buffers, and the values of all buffers: batch norm changes its statistics without a
      new version of the tensor;
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


class HookState:
    """The hooks of a model's modules.

    Args:
        model: The model.
        modules: Its modules, if they are known.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module] | None = None) -> None:
        self._hooks: list[tuple[dict[int, Any], dict[int, Any]]] = []
        self._empty: list[dict[int, Any] | None] = []
        containers: list[dict[int, Any] | None] = []
        for module in model.modules() if modules is None else modules:
            containers += map(vars(module).get, HOOKS)
        if not any(containers):
            self._empty = containers
        else:
            for hooks in containers:
                if hooks:
                    self._hooks.append((hooks, dict(hooks)))
                else:
                    self._empty.append(hooks)

    def restore(self) -> None:
        """Remove new hooks, and register removed ones again."""
        _clear_all(self._empty)
        for hooks, before in self._hooks:
            if hooks.keys() != before.keys():
                recorded = {}
                for key, hook in before.items():
                    if key in hooks or getattr(hook, "__name__", "") != "_infer_parameters":
                        recorded[key] = hook  # except the hook of a lazy layer whose parameters exist by now
                hooks.clear()
                hooks.update(recorded)


def _prefixes(model: nn.Module) -> dict[nn.Module, str]:
    """Return the same modules as ``model.named_modules()``, several times faster, with prefixes of their parameters' names."""
    prefixes: dict[nn.Module, str] = {}
    waiting = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        if module not in prefixes:
            prefixes[module] = prefix
            for name, child in reversed(module._modules.items()):
                if child is not None:
                    waiting.append((f"{prefix}{name}.", child))
    return prefixes


def _overrides(model: nn.Module, *names: str) -> bool:
    kind = type(model)
    return any(getattr(kind, name) is not getattr(nn.Module, name) for name in names)


def _lists_modules_as_usual(model: nn.Module) -> bool:
    return not _overrides(model, "modules", "named_modules")


def modules_of(model: nn.Module) -> Iterable[nn.Module]:
    """Return the same modules as ``model.modules()``, several times faster."""
    return _prefixes(model) if _lists_modules_as_usual(model) else model.modules()


def named_parameters(model: nn.Module, prefixes: Mapping[nn.Module, str] | None = None) -> dict[str, nn.Parameter]:
    """Return the same as ``dict(model.named_parameters())``, several times faster.

    Args:
        model: The model.
        prefixes: Its modules, with the prefixes of their parameters' names, if they are known.

    Example:
        >>> list(named_parameters(nn.Sequential(nn.Linear(2, 3))))
        ['0.weight', '0.bias']
    """
    if _overrides(model, "named_parameters", "_named_members", "named_modules"):
        return dict(model.named_parameters())
    names: dict[nn.Parameter, str] = {}
    for module, prefix in (prefixes or _prefixes(model)).items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(parameter, prefix + name)
    return dict(zip(names.values(), names, strict=True))


def exclusive(model: nn.Module) -> threading.RLock:
    """Return the lock of a model, which one thread can take repeatedly."""
    with _GUARD:
        return _LOCKS.setdefault(model, threading.RLock())


@lru_cache(maxsize=1024)
def _own_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the attributes that not all modules have."""
    return tuple(itertools.filterfalse(INTERNAL.__contains__, names))


class ModelRecord:
    """The state of a model and of the random number generators at one moment, recorded in one pass over the modules.

    Args:
        model: The model.

    Attributes:
        modules: The modules of the model.
        prefixes: The prefixes of their parameters' names; ``None`` if the model lists its modules in another way.
    """

    def __init__(self, model: nn.Module) -> None:
        self.prefixes = _prefixes(model) if _lists_modules_as_usual(model) else None
        self.modules = tuple(model.modules() if self.prefixes is None else self.prefixes)
        self.attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        """For each module its attributes, and a copy of its mode and of the attributes that not all modules have."""
        self._sizes: list[int] = []
        self.parameters: list[nn.Parameter] = []
        self._requirements: list[tuple[bool, Tensor | None]] = []
        self._containers: list[ContainerRecord] = []
        self._registers: list[ContainerRecord] = []
        self._empty: list[Any] = []
        self._arrays: list[ArrayRecord] = []
        self._buffers: list[Tensor] = []
        self._tensors: list[Tensor] = []
        seen: set[int] = set()
        for module in self.modules:
            self._record_attributes(vars(module), seen)
            self._record_buffers(module)
            self._record_parameters(module)
        self._hooks = HookState(model, self.modules)
        self.generators = RandomState(model)
        self._memory = MemoryRecord(filter(is_ordinary, self.parameters))
        self._values = TensorRecords(self.tensors())
        self._written = list(map(TensorRecord, filter(is_written, self.parameters)))
        note_open(model, self)

    def note_written(self, tensor: Tensor) -> None:
        """Store the values of a parameter before it is changed in place; those of buffers and attributes are stored already."""
        if any(map(partial(is_, tensor), self.parameters)):
            self._written.append(TensorRecord(tensor))

    def _record_attributes(self, attributes: dict[str, Any], seen: set[int]) -> None:
        before, changeable = {}, []
        for name in _own_names(tuple(attributes)):
            before[name] = value = attributes[name]
            kind = type(value)
            is_plain = _UNCHANGEABLE.issuperset(map(type, value)) if kind is tuple else kind in _UNCHANGEABLE
            if not is_plain:
                changeable.append(name)
        for name in sorted(changeable):
            for part in mutable_parts(before[name], seen):
                self._record_part(part)
        if "training" in attributes:  # a compiled module does not have it
            before["training"] = attributes["training"]
        self.attributes.append((attributes, before))
        self._sizes.append(len(attributes))

    def _record_part(self, part: Any) -> None:
        if isinstance(part, np.ndarray):
            self._arrays.append(ArrayRecord(part))
        elif isinstance(part, Tensor):
            self._tensors.append(part)
        else:
            self._record_container(part, self._containers)

    def _record_container(self, container: Any, records: list[ContainerRecord]) -> None:
        if container:
            records.append(ContainerRecord(container))
        else:
            self._empty.append(container)

    def _record_parameters(self, module: nn.Module) -> None:
        registered = module._parameters
        if not registered and type(registered) is dict:
            self._empty.append(registered)
            return
        if type(registered) in CONTAINERS:  # a scripted module's is not a dictionary
            self._record_container(registered, self._registers)
        for parameter in registered.values():
            if parameter is not None:
                self.parameters.append(parameter)
                self._requirements.append((parameter.requires_grad, parameter.grad))
        if vars(module).get("max_norm") is not None:  # an embedding that rescales its weight in place
            weight = dict(registered.items()).get("weight")
            if weight is not None:
                self._tensors.append(weight)

    def _record_buffers(self, module: nn.Module) -> None:
        registered = module._buffers
        if not registered and type(registered) is dict:
            self._empty.append(registered)
            return
        if type(registered) in CONTAINERS:
            self._record_container(registered, self._containers)
        for buffer in registered.values():
            if buffer is not None:
                self._buffers.append(buffer)

    @property
    def has_attribute_tensors(self) -> bool:
        """Whether attributes contain tensors that are neither parameters nor buffers."""
        return bool(self._tensors)

    def tensors(self) -> list[Tensor]:
        """Return the buffers and the tensors among the attributes, in a fixed order."""
        return [*self._buffers, *self._tensors]

    def restore(self) -> None:
        """Set everything to this state."""
        warn_of_late_writes(self.modules[0], self._late_writes())
        for parameter, (requires_grad, gradient) in zip(self.parameters, self._requirements, strict=True):
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not gradient:
                parameter.grad = gradient
        for container in self._registers:
            container.restore()
        self._restore_parameters()
        self._restore_attributes()
        self._values.restore()
        self._hooks.restore()
        self.generators.restore()

    def _late_writes(self) -> list[Tensor]:
        """Return the parameters that were changed in place and of which there are no copies."""
        late = self._memory.written()
        copied = set(map(id, self._tensors))
        copied.update(id(record.tensor) for record in self._written)
        return [tensor for tensor in late if id(tensor) not in copied]

    def restore_for_forward(self) -> None:
        """Set the attributes, hooks, and the changed values of tensors to this state, but not the generators."""
        self._hooks.restore()
        self._restore_attributes()
        self.restore_tensors()

    def restore_tensors(self) -> None:
        """Set the parameters, buffers and tensors that a forward pass has replaced or changed in place to this state."""
        self._restore_parameters()
        self._values.restore_if_changed()

    def _restore_parameters(self) -> None:
        """Set the values of parameters that a forward pass has replaced or changed in place to this state."""
        self._memory.restore()
        for parameter in self._written:
            parameter.restore()

    def _restore_attributes(self) -> None:
        for (attributes, before), size in zip(self.attributes, self._sizes, strict=True):
            attributes.update(before)
            if len(attributes) != size:
                for name in attributes.keys() - INTERNAL - before.keys():
                    del attributes[name]
        _clear_all(self._empty)
        for container in self._containers:
            container.restore()
        for array in self._arrays:
            array.restore()


def _clear_all(containers: Sequence[Any]) -> None:
    for container in containers if any(containers) else ():
        if container:
            container.clear()
