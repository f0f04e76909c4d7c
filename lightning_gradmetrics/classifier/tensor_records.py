"""Records the values and the memory of tensors, and finds the tensors that a forward pass changes in place."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from ctypes import string_at
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from lightning_gradmetrics.classifier.large_parts import LARGE, fingerprint, recorded_copy
from lightning_gradmetrics.classifier.notices import warn_once

__all__ = [
    "MemoryRecord",
    "TensorRecord",
    "TensorRecords",
    "first_pass_watched",
    "is_ordinary",
    "is_written",
    "note_open",
    "version_of",
    "warn_of_late_writes",
    "with_read_gradients",
    "written_among",
    "written_arguments",
]

_WRITTEN: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The parameters, buffers and tensors among attributes that a watched forward pass has changed in place."""

_READ: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The parameters whose ``.grad`` a watched forward pass has read."""

_WATCHED: WeakKeyDictionary[nn.Module, tuple[int, ...]] = WeakKeyDictionary()
"""The models of which a forward pass was watched, with the identities of their parameters at that time."""

_OPEN: WeakSet[Any] = WeakSet()
"""The records of models that were made before a forward pass of the model was watched."""


class MemoryRecord:
    """The memory of tensors, which ``tensor.data = other`` replaces, and how often they were changed in place; nothing is copied.

    Args:
        tensors: Tensors that :func:`is_ordinary`.
    """

    __slots__ = ("_aliases", "_tensors", "_versions")

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._aliases = list(map(Tensor.detach, self._tensors))
        self._versions = list(map(_VERSION, self._tensors))

    def written(self) -> list[Tensor]:
        """Return the tensors that were changed in place."""
        if list(map(_VERSION, self._tensors)) == self._versions:
            return []
        pairs = zip(self._tensors, self._versions, strict=True)
        return [tensor for tensor, version in pairs if tensor._version != version]

    def restore(self) -> None:
        """Make the tensors use the recorded memory again."""
        try:
            if all(map(Tensor.is_set_to, self._tensors, self._aliases)):
                return
        except NotImplementedError:  # torch cannot compare memory on some devices
            return
        for tensor, alias in zip(self._tensors, self._aliases, strict=True):
            if not tensor.is_set_to(alias):
                tensor.data = alias


def is_ordinary(tensor: Tensor) -> bool:
    """Return whether a tensor has ordinary memory and a version, unlike uninitialised parameters and most subclasses."""
    is_plain = type(tensor) is nn.Parameter or type(tensor) is Tensor
    return (
        is_plain
        and tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_quantized or tensor.is_inference())
    )


_VERSION = Tensor._version.__get__  # type: ignore[attr-defined]


class TensorRecord:
    """The values of a tensor, which are restored without a version bump, so that graphs with the tensor stay valid.

    Args:
        tensor: The tensor.
    """

    __slots__ = ("_mark", "_memory", "_requires_grad", "_value", "_version", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._requires_grad = tensor, tensor.requires_grad
        self._version = -1 if tensor.is_inference() else tensor._version
        self._memory, self._mark = MemoryRecord(filter(is_ordinary, [tensor])), fingerprint(tensor)
        self._value = recorded_copy(tensor, self._mark)

    def restore(self) -> None:
        """Restore the memory, the values and the flag ``requires_grad``."""
        self._memory.restore()
        self._restore_values()
        tensor = self.tensor
        if tensor.requires_grad != self._requires_grad and tensor.is_leaf:
            tensor.requires_grad_(self._requires_grad)

    def _restore_values(self) -> None:
        tensor, value = self.tensor, self._value
        if self._mark is not None and tensor.shape == value.shape and fingerprint(tensor) == self._mark:
            return  # a large tensor that no forward pass has changed
        if tensor.is_inference():
            with torch.inference_mode():
                tensor.copy_(value)
        elif tensor.shape == value.shape:
            _write(tensor, value)
        else:
            tensor.data = value.clone()  # the copy may be used again

    def restore_if_changed(self) -> None:
        """Restore memory that was replaced, and the values if the tensor has a new version or forward passes change it."""
        self._memory.restore()
        if self._version >= 0 and (self.tensor._version != self._version or is_written(self.tensor)):
            _write(self.tensor, self._value)


def _write(tensor: Tensor, values: Tensor) -> None:
    """Copy values into a tensor without a new version; positions that share memory, as in an expanded tensor, are written once."""
    target = tensor.data
    for dim, step in enumerate(tensor.stride() if tensor.layout is torch.strided else ()):
        if step == 0 and tensor.shape[dim] > 1:
            target, values = target.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    target.copy_(values)


class TensorRecords:
    """The values of several tensors: the bytes of small ones on the CPU, and joined copies of small ones on other devices.

    Args:
        tensors: The tensors.
    """

    __slots__ = ("_bytes", "_copies", "_joined", "_memory", "_others", "_sizes", "_small")

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._others: list[TensorRecord] = []
        self._joined: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        self._small: list[Tensor] = []
        on_devices: list[Tensor] = []
        for tensor in tensors:
            if not _is_small(tensor):
                if not is_lazy(tensor):  # a lazy buffer has no values yet
                    self._others.append(TensorRecord(tensor))
            elif tensor.is_cpu:
                self._small.append(tensor)
            else:
                self._joined.setdefault((tensor.dtype, tensor.device), []).append(tensor)
                on_devices.append(tensor)
        self._memory, self._copies = MemoryRecord(self._small + on_devices), list(map(_joined, self._joined.values()))
        self._sizes = list(map(_NBYTES, self._small))
        self._bytes = self._present_bytes()

    def restore(self) -> None:
        """Restore the memory, the values and the flags ``requires_grad``."""
        self._restore_small()
        for tensor in itertools.chain(self._small, *self._joined.values()):
            if tensor.requires_grad and tensor.is_leaf:
                tensor.requires_grad_(False)
        for record in self._others:
            record.restore()

    def restore_if_changed(self) -> None:
        """Restore memory that was replaced and values that were changed; large tensors are changed if they have a new version."""
        self._restore_small()
        for record in self._others:
            record.restore_if_changed()

    def _present_bytes(self) -> list[bytes]:
        """Return copies of the bytes of small tensors, which distinguish NaNs, and -0.0 from 0.0."""
        return list(map(string_at, map(Tensor.data_ptr, self._small), self._sizes))

    def _restore_small(self) -> None:
        self._memory.restore()
        if self._small and self._present_bytes() != self._bytes:
            for tensor, content in zip(self._small, self._bytes, strict=True):
                if content:
                    values = torch.frombuffer(bytearray(content), dtype=tensor.dtype)
                    tensor.data.copy_(values.view(tensor.shape))
        for tensors, copy in zip(self._joined.values(), self._copies, strict=True):
            values_of_all = torch._C._nn.unflatten_dense_tensors(copy, tensors)  # type: ignore[attr-defined]
            torch._foreach_copy_([tensor.data for tensor in tensors], values_of_all)


_NBYTES = Tensor.nbytes.__get__  # type: ignore[attr-defined]


def _is_small(tensor: Tensor) -> bool:
    """Return whether a tensor can be copied together with others."""
    if not is_ordinary(tensor) or tensor.requires_grad or tensor.dtype not in _JOINED:
        return False
    return tensor.nbytes < LARGE and tensor.is_contiguous()


_JOINED = frozenset([torch.float32, torch.float64, torch.int64, torch.int32, torch.bool, torch.float16, torch.bfloat16])
"""Types of tensors that are copied together: neither quantised nor complex."""


def _joined(tensors: list[Tensor]) -> Tensor:
    """Return a copy of the entries of all tensors."""
    if len(tensors) == 1:
        return tensors[0].clone().view(-1)
    return torch._C._nn.flatten_dense_tensors(tensors)  # type: ignore[no-any-return]


def is_written(tensor: Tensor) -> bool:
    """Return whether a watched forward pass has changed a parameter or another tensor of its model in place."""
    return bool(_WRITTEN) and tensor in _WRITTEN


def written_among(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the parameters and other tensors of a model that a watched forward pass has changed in place."""
    return list(filter(_WRITTEN.__contains__, tensors)) if _WRITTEN else []


def with_read_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the parameters whose ``.grad`` a watched forward pass of their model has read."""
    return list(filter(_READ.__contains__, parameters)) if _READ else []


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; 0 for an inference tensor."""
    return 0 if tensor.is_inference() else tensor._version


def warn_of_late_writes(model: nn.Module, late: Iterable[Tensor]) -> None:
    """Warn about parameters that a forward pass has changed in place, although the first pass did not: no copy restores them.

    Later records contain copies of them.
    """
    names: list[str] = []
    for parameter in late:
        _WRITTEN[parameter] = True
        names += [name for name, other in model.named_parameters() if other is parameter]
    if names:
        warn_once(
            model,
            f"a forward pass of {type(model).__name__} has changed parameters in place, unlike its first pass; they keep the new "
            f"values: {', '.join(names)}. Later calls restore them",
            stacklevel=4,
        )


def note_open(model: nn.Module, record: Any) -> None:
    """Let a record of a model store the values of tensors that the first forward pass changes in place.

    The record has ``parameters`` and ``tensors()``, which are watched. ``note_written`` is called before one is changed, and
    ``show_gradient`` before the ``.grad`` of one is read.
    A model with other parameters than at its first pass, as after ``load_state_dict(assign=True)``, is watched again.
    """
    if _WATCHED.get(model) != _identities(record.parameters):
        _WATCHED.pop(model, None)
        _OPEN.add(record)


def first_pass_watched(model: nn.Module) -> AbstractContextManager[None]:
    """Watch the first forward pass of a model, so that the tensors that it changes in place are copied first.

    Later records contain copies of these tensors. Copies of all parameters in every call would take too long.
    """
    return nullcontext() if model in _WATCHED or not _OPEN else _watched(model)


@contextmanager
def _watched(model: nn.Module) -> Iterator[None]:
    # torch.compile may give up on functions that it meets inside of a mode.
    is_compiler_loaded = "torch._dynamo" in sys.modules
    parameters = _registered(model)
    stance = torch.compiler.set_stance("force_eager") if is_compiler_loaded else nullcontext()  # type: ignore[no-untyped-call]
    with stance, _Watch(), _GradientReads():
        yield
    _WATCHED[model] = parameters


def _registered(model: nn.Module) -> tuple[int, ...]:
    """Return the identities of all registered parameters, in the order of a record."""
    parameters: list[Tensor] = []
    for module in model.modules():
        parameters += [parameter for parameter in module._parameters.values() if parameter is not None]
    return _identities(parameters)


def _identities(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(map(id, tensors))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes each tensor of the recorded models before an operation changes it in place."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors: dict[int, dict[int, Tensor]] = {}
        for record in tuple(_OPEN):
            for tensor in (*record.parameters, *record.tensors()):
                for key in _keys(tensor):
                    self._tensors.setdefault(key, {})[id(tensor)] = tensor

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: torch would import its compiler, which takes a second, to keep it away from this class."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        for place, name in written_arguments(func):
            value = args[place] if place < len(args) else kwargs.get(name)
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                self._note(tensor)
        return func(*args, **kwargs)

    def _note(self, changed: Any) -> None:
        """Record all tensors with the memory of one that is about to change."""
        for key in _keys(changed) if isinstance(changed, Tensor) else ():
            for tensor in self._tensors.pop(key, {}).values():
                with _disable_current_modes(), torch.no_grad():
                    for record in tuple(_OPEN):
                        record.note_written(tensor)
                _WRITTEN[tensor] = True


class _GradientReads(TorchFunctionMode):
    """Lets the recorded models show the gradient of a parameter before a forward pass reads its ``.grad``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call."""
        if func == _GRADIENT:
            _READ[args[0]] = True
            for record in tuple(_OPEN):
                record.show_gradient(args[0])
        return func(*args, **(kwargs or {}))


_GRADIENT = Tensor.grad.__get__  # type: ignore[union-attr]


def _keys(tensor: Tensor) -> tuple[int, ...]:
    """Return the identity of a tensor's memory, which views share; nothing for a tensor without memory."""
    try:
        with torch._C.DisableTorchFunction():
            return (tensor.untyped_storage()._cdata,)
    except (RuntimeError, NotImplementedError, ValueError):
        return ()


@lru_cache(maxsize=1024)
def written_arguments(function: Any) -> tuple[tuple[int, str], ...]:
    """Return the positions and the names of the arguments that an operation changes in place."""
    schema = getattr(function, "_schema", None)
    written: list[tuple[int, str]] = []
    for place, argument in enumerate(() if schema is None else schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append((place, argument.name))
    return tuple(written)
