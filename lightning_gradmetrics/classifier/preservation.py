"""Restores a model and torch's random number generators after use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

__all__ = ["HookState", "RandomState", "preserved"]

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

CONTAINERS = (dict, OrderedDict, list, set)

Undo = Callable[[], None]

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_GUARD = threading.Lock()


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore the model and the random number generators at the end of the block, also after an exception.

    Restored are:

    - each parameter's ``requires_grad`` and ``.grad``, and each module's train or eval mode;
    - which tensors are parameters and buffers, and the values of all buffers: batch norm changes its statistics without a
      new version of the tensor;
    - attributes that a forward pass sets, replaces or deletes, including the entries of lists, dictionaries and sets and
      the values of tensors;
    - the weights of embeddings with ``max_norm``, which a forward pass rescales; other parameters are not copied;
    - hooks of modules, because transformers adds some in a forward pass that returns hidden states;
    - the random number generators, see :class:`RandomState`.

    A second thread that enters with the same model waits for the first one.
    """
    with _lock_of(model):
        undo = [*_parameter_state(model), *_module_state(model), HookState(model).restore]
        generators = RandomState(model)
        try:
            yield
        finally:
            for restore in undo:
                restore()
            generators.restore()


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
    """

    def __init__(self, model: nn.Module) -> None:
        self._hooks: list[tuple[dict[int, Any], dict[int, Any]]] = []
        for module in model.modules():
            attributes = vars(module)
            for name in HOOKS:
                hooks = attributes.get(name)
                if hooks is not None:
                    self._hooks.append((hooks, dict(hooks)))

    def restore(self) -> None:
        """Remove new hooks, and register removed ones again."""
        for hooks, before in self._hooks:
            if hooks.keys() != before.keys():
                kept = {}
                for key, hook in before.items():
                    if key in hooks or getattr(hook, "__name__", "") != "_infer_parameters":
                        kept[key] = hook  # except the hook of a lazy layer whose parameters exist by now
                hooks.clear()
                hooks.update(kept)


def _lock_of(model: nn.Module) -> threading.RLock:
    with _GUARD:
        return _LOCKS.setdefault(model, threading.RLock())


def _parameter_state(model: nn.Module) -> Iterator[Undo]:
    for parameter in model.parameters():
        yield _parameter_undo(parameter)


def _parameter_undo(parameter: nn.Parameter) -> Undo:
    requires_grad, gradient = parameter.requires_grad, parameter.grad

    def restore() -> None:
        if parameter.requires_grad != requires_grad:
            parameter.requires_grad_(requires_grad)
        parameter.grad = gradient

    return restore


def _module_state(model: nn.Module) -> Iterator[Undo]:
    """Yield the undo functions of each module's mode, tensors and other attributes."""
    empty: list[Any] = []
    for module in model.modules():
        attributes = vars(module)
        names = attributes.keys() - INTERNAL
        yield _attribute_undo(attributes, names)
        for value in (module._parameters, module._buffers, *map(attributes.__getitem__, names)):
            if type(value) in CONTAINERS:
                if value:
                    yield _container_undo(value)
                else:
                    empty.append(value)
            elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                yield _tensor_undo(value)
        for buffer in module._buffers.values():
            if buffer is not None:
                yield _tensor_undo(buffer)
        weight = dict(module._parameters.items()).get("weight")  # a scripted module's is not a dictionary
        if weight is not None and attributes.get("max_norm") is not None:  # an embedding that rescales it in place
            yield _tensor_undo(weight)
    yield partial(_clear_all, empty)


def _clear_all(containers: Sequence[Any]) -> None:
    for container in containers:
        if container:
            container.clear()


def _attribute_undo(attributes: dict[str, Any], names: Set[str]) -> Undo:
    before = {name: attributes[name] for name in names}
    if "training" in attributes:  # a compiled module does not have it
        before["training"] = attributes["training"]
    size = len(attributes)

    def restore() -> None:
        attributes.update(before)
        if len(attributes) != size:
            for name in attributes.keys() - INTERNAL - names:
                del attributes[name]

    return restore


def _container_undo(container: Any) -> Undo:
    """Return a function that restores the entries of a dictionary, a list or a set in place."""
    entries = container.copy()

    def restore() -> None:
        container.clear()
        if isinstance(container, list):
            container.extend(entries)
        else:
            container.update(entries)

    return restore


def _tensor_undo(tensor: Tensor) -> Undo:
    """Return a function that restores the values without a version bump, so that graphs with the tensor stay valid."""
    requires_grad, value = tensor.requires_grad, tensor.detach().clone()

    def restore() -> None:
        if tensor.is_inference():
            with torch.inference_mode():
                tensor.copy_(value)
        elif tensor.shape == value.shape:
            tensor.data.copy_(value)
        else:
            tensor.data = value
        if tensor.requires_grad != requires_grad and tensor.is_leaf:
            tensor.requires_grad_(requires_grad)

    return restore
