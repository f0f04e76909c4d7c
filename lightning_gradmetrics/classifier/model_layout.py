"""The modules of a model with their attributes, hooks and registered tensors: recorded, compared and restored."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from operator import attrgetter, is_, itemgetter
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
from torch import Tensor, nn

from lightning_gradmetrics.classifier.large_parts import ArrayRecord
from lightning_gradmetrics.classifier.mutable_parts import ContainerRecord, mutable_parts, sort_entries
from lightning_gradmetrics.classifier.tensor_records import is_ordinary

__all__ = ["HOOKS", "INTERNAL", "HookState", "ModelLayout", "layout_of", "modules_of", "named_parameters"]

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

_DICTIONARIES = ("_parameters", "_buffers", "_modules", *HOOKS)
"""Attributes of a module that are dictionaries, whose entries are compared."""

_UNCHANGEABLE = frozenset([bool, int, float, str, type(None)])
"""Types whose values a forward pass can replace, but not change."""

CONTAINERS = (dict, OrderedDict, list, set)

MOST_BYTES = 2**26
"""Largest size of the tensors of a stored layout: tensors that the caller has replaced are in memory until the next call."""

MOST_LAYOUTS = 32
"""Largest number of stored layouts."""

_LAYOUTS: WeakKeyDictionary[nn.Module, ModelLayout] = WeakKeyDictionary()


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

    def __bool__(self) -> bool:
        return bool(self._hooks)

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


def _overrides(model: nn.Module, methods: attrgetter[Any]) -> bool:
    return bool(methods(type(model)) != methods(nn.Module))


_LISTING_MODULES = attrgetter("modules", "named_modules")
_LISTING_PARAMETERS = attrgetter("named_parameters", "_named_members", "named_modules")
_LISTING = attrgetter("modules", "named_modules", "named_parameters", "_named_members")


def _lists_modules_as_usual(model: nn.Module) -> bool:
    return not _overrides(model, _LISTING_MODULES)


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
    if _overrides(model, _LISTING_PARAMETERS):
        return dict(model.named_parameters())
    named: dict[int, tuple[str, nn.Parameter]] = {}  # the hash of a tensor is computed in Python
    for module, prefix in (prefixes or _prefixes(model)).items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                named.setdefault(id(parameter), (prefix + name, parameter))
    return dict(named.values())


@lru_cache(maxsize=1024)
def _own_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the attributes that not all modules have."""
    return tuple(itertools.filterfalse(INTERNAL.__contains__, names))


class ModelLayout:
    """The objects that a model consists of at one moment, found in one pass over the modules.

    It has no reference to the model itself, so that it may be stored as long as the model exists.

    Args:
        model: The model.

    Attributes:
        attributes: For each module its attributes, and a copy of its mode and of the attributes that not all modules have.
        parameters: All registered parameters.
        buffers: All registered buffers.
        tensors: The tensors among the attributes, and parameters that a forward pass is known to change in place.
        is_accepted: Set by callers that have checked the modules and their modes, and need not check them again.
        attribute_entries: Set by callers that have listed plain attributes, with the names of those that they have listed.
    """

    def __init__(self, model: nn.Module) -> None:
        prefixes = _prefixes(model) if _lists_modules_as_usual(model) else None
        modules = tuple(model.modules() if prefixes is None else prefixes)
        self._model, self._others = ref(model), modules[1:]
        self._prefixes = None if prefixes is None else list(prefixes.values())
        self.attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._names: list[tuple[str, ...]] = []
        self.parameters: list[nn.Parameter] = []
        self.buffers: list[Tensor] = []
        self.tensors: list[Tensor] = []
        self._containers: list[ContainerRecord] = []
        self._registers: list[ContainerRecord] = []
        self._empty: list[Any] = []
        self._empty_registers: list[Any] = []
        self._arrays: list[ArrayRecord] = []
        self._lists: list[list[Any]] = []
        self._is_plain = True
        self.is_accepted = False
        self.attribute_entries: tuple[Any, tuple[Any, ...]] | None = None
        seen: set[int] = set()
        for module in modules:
            self._record_attributes(vars(module), seen)
            self._record_buffers(module)
            self._record_parameters(module)
            self._record_registers(module)
        self._hooks = HookState(model, modules)
        self._compared: _Comparison | None = None

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules, the model first."""
        model = self._model()
        assert model is not None
        return (model, *self._others)

    @cached_property
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The same as ``dict(model.named_parameters())``."""
        model = self.modules[0]
        prefixes = None if self._prefixes is None else dict(zip(self.modules, self._prefixes, strict=True))
        return named_parameters(model, prefixes)

    @cached_property
    def ordinary_parameters(self) -> list[nn.Parameter]:
        """The parameters with ordinary memory and a version."""
        return list(filter(is_ordinary, self.parameters))

    def remember(self) -> bool:
        """Prepare :meth:`is_current`; return False if the layout cannot be compared quickly.

        That requires attributes of plain values, no hooks, and little memory.
        """
        tensors, modules = [*self.parameters, *self.buffers], self.modules
        is_plain = self._is_plain and not self._hooks and not _overrides(modules[0], _LISTING)
        if not is_plain or not all(map(is_ordinary, tensors)) or any(map(vars, tensors)):
            return False
        compared = _Comparison(modules, self._lists)
        has_cycle = any(map(partial(is_, modules[0]), compared.entries))
        if not compared.is_possible or has_cycle or sum(tensor.nbytes for tensor in tensors) > MOST_BYTES:
            return False
        self._compared = compared
        return True

    @property
    def is_compared(self) -> bool:
        """Whether the layout is stored, and used again only if the model consists of the same objects."""
        return self._compared is not None

    def is_current(self) -> bool:
        """Return whether the model still consists of the same objects; False if that cannot be found out quickly."""
        return self._compared is not None and self._compared.agrees(self.modules)

    def _record_attributes(self, attributes: dict[str, Any], seen: set[int]) -> None:
        before, changeable, names = {}, [], tuple(attributes)
        for name in _own_names(names):
            before[name] = value = attributes[name]
            kind = type(value)
            is_plain = _UNCHANGEABLE.issuperset(map(type, value)) if kind in (tuple, list) else kind in _UNCHANGEABLE
            if is_plain and kind is list:
                self._lists.append(value)
            if not is_plain or kind is list:
                changeable.append(name)
            self._is_plain = self._is_plain and is_plain
        for name in sorted(changeable):
            for part in mutable_parts(before[name], seen):
                self._record_part(part)
        if "training" in attributes:  # a compiled module does not have it
            before["training"] = attributes["training"]
        self.attributes.append((attributes, before))
        self._names.append(names)

    def _record_part(self, part: Any) -> None:
        if isinstance(part, np.ndarray):
            self._arrays.append(ArrayRecord(part))
        elif isinstance(part, Tensor):
            self.tensors.append(part)
        else:
            self._record_container(part, self._containers, self._empty)

    def _record_container(self, container: Any, filled: list[ContainerRecord], empty: list[Any]) -> None:
        if container:
            filled.append(ContainerRecord(container))
        else:
            empty.append(container)

    def _record_parameters(self, module: nn.Module) -> None:
        registered = module._parameters
        for parameter in registered.values():
            if parameter is not None:
                self.parameters.append(parameter)
        if vars(module).get("max_norm") is not None:  # an embedding that rescales its weight in place
            weight = dict(registered.items()).get("weight")
            if weight is not None:
                self.tensors.append(weight)

    def _record_registers(self, module: nn.Module) -> None:
        for registered in (module._parameters, module._modules):
            if type(registered) in CONTAINERS:  # a scripted module's is not a dictionary
                self._record_container(registered, self._registers, self._empty_registers)

    def _record_buffers(self, module: nn.Module) -> None:
        registered = module._buffers
        if not registered and type(registered) is dict:
            self._empty.append(registered)
            return
        if type(registered) in CONTAINERS:
            self._record_container(registered, self._containers, self._empty)
        for buffer in registered.values():
            if buffer is not None:
                self.buffers.append(buffer)

    def restore_registered(self) -> list[str]:
        """Set the registered parameters and submodules to those of this state; return the names of added parameters."""
        changed = [container for container in self._registers if container.has_changed()]
        if not changed and not any(self._empty_registers):
            return []
        present = named_parameters(self.modules[0])
        _clear_all(self._empty_registers)
        for container in changed:
            container.restore()
        known, added = set(map(id, self.parameters)), []
        for name, parameter in present.items():
            if name not in self.named_parameters and id(parameter) not in known:
                added.append(name)
        return added

    def restore(self) -> None:
        """Set attributes, hooks and buffers to those of this state."""
        self._hooks.restore()
        for (attributes, before), names in zip(self.attributes, self._names, strict=True):
            attributes.update(before)
            if tuple(attributes) != names:
                for name in attributes.keys() - INTERNAL - before.keys():
                    del attributes[name]
                sort_entries(attributes, names)
        _clear_all(self._empty)
        for container in self._containers:
            container.restore()
        for array in self._arrays:
            array.restore()


class _Comparison:
    """Compares the attributes of all modules, and the entries of their dictionaries and lists, by identity.

    Args:
        modules: The modules.
        lists: The lists among the attributes.
    """

    def __init__(self, modules: Sequence[nn.Module], lists: Sequence[list[Any]]) -> None:
        self._own = list(map(vars, modules))
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        dictionaries: list[dict[Any, Any]] = []
        for own in self._own:
            groups.setdefault(_own_names(tuple(own)), []).append(own)
            dictionaries += map(own.__getitem__, _DICTIONARIES)
        self._groups = list(groups.values())
        self._getters = [itemgetter(*_DICTIONARIES, "training", *names) for names in groups]
        self.is_possible = {dict, OrderedDict}.issuperset(map(type, dictionaries))
        self._filled = list(filter(None, dictionaries))
        self._empty = [entries for entries in dictionaries if not entries]
        self._lists, self._sized = lists, (*self._own, *self._filled, *lists)
        self._lengths = list(map(len, self._sized))
        self.entries = list(self._present(modules))

    def _present(self, modules: Sequence[nn.Module]) -> Iterator[Any]:
        """Yield everything that is compared."""
        attributes = _chained(_chained(map(map, self._getters, self._groups)))
        entries = (*self._filled, *map(dict.values, self._filled), *self._lists)
        return itertools.chain(map(vars, modules), map(type, modules), attributes, _chained(entries))

    def agrees(self, modules: Sequence[nn.Module]) -> bool:
        """Return whether the modules have the same objects as attributes and entries, in the same order."""
        try:
            has_lengths = not any(self._empty) and list(map(len, self._sized)) == self._lengths
            return has_lengths and all(map(is_, self._present(modules), self.entries))
        except KeyError:  # an attribute was deleted
            return False


_chained = itertools.chain.from_iterable


def layout_of(model: nn.Module) -> ModelLayout:
    """Return the present layout of a model, which is that of the last call if one pass over all dictionaries finds no other object."""
    known = _LAYOUTS.get(model)
    if known is not None and known.is_current() and not _overrides(model, _LISTING):
        return known
    layout = ModelLayout(model)
    if layout.remember():
        _drop_changed()
        _LAYOUTS[model] = layout
        while len(_LAYOUTS) > MOST_LAYOUTS:
            _LAYOUTS.pop(next(iter(_LAYOUTS)), None)
    else:
        _LAYOUTS.pop(model, None)
    return layout


def _drop_changed() -> None:
    """Delete the layouts of changed models: a submodule that has got a reference to its model would keep it in memory."""
    for model, layout in list(_LAYOUTS.items()):
        if not layout.is_current():
            del _LAYOUTS[model]


def _clear_all(containers: Sequence[Any]) -> None:
    for container in containers if any(containers) else ():
        if container:
            container.clear()
