"""Records the calls of a forward pass: what is called, with which tensors and constants, and which sizes occur."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from types import FrameType
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_gradmetrics.classifier import norm_gradients, tensor_records
from lightning_gradmetrics.classifier.tensor_records import version_of
from lightning_gradmetrics.engine.tracing.calls import HOST_READS, tensors_in
from lightning_gradmetrics.engine.tracing.graph import storing_hooks

__all__ = ["HOOKS", "Outline", "Recording"]

_VIEWS = "view reshape expand unflatten flatten split chunk narrow repeat tile as_strided select __getitem__"
_NEW = "new_zeros new_ones new_full new_empty new_empty_strided zeros ones full empty empty_strided arange"
_SHAPING = frozenset([*_VIEWS.split(), *_NEW.split()])
"""Functions whose integer arguments may depend on the sizes of the inputs."""

_FILLING = frozenset(["full", "new_full"])
"""Functions whose plain numbers are values of the result, and whose tuples are its shape."""

_HOOKING = frozenset(["register_hook", "register_post_accumulate_grad_hook"])
"""Functions that may change how gradients are computed."""

HOOKS = "hooks on tensors, or on what autograd stores, may change its gradients"
"""Why each sample runs alone if a forward pass registers hooks."""

_NODE = Tensor.grad_fn.__get__  # type: ignore[union-attr]
"""The function that returns the node of the graph, on which hooks may be registered too."""

_STRUCTURAL = frozenset([str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format])
"""Types of constants with distinct hashes."""

_TENSORS = frozenset([Tensor, nn.Parameter])

MOST_ENTRIES = 64
"""Largest number of entries of a tensor of unknown origin that are compared by value."""

_UNKNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_NUMBERS = itertools.count()
"""Numbers of larger tensors of unknown origin: no two tensors share one."""


class Outline:
    """The calls of a forward pass that return or change tensors.

    Each tensor argument is recorded as the result of an earlier call, as a parameter, buffer or input, or by its values. So a
    model that chooses another tensor in larger batches has another outline, even if it makes the same calls.

    Args:
        leaves: The kind, the number and the first version of each parameter, buffer and input, by the identity of the tensor.

    Attributes:
        leaves: These entries.
        sizes: Every integer that may be a size: those of functions that set a shape, and the shapes of all results.
        has_hooks: Whether the forward pass registers hooks on tensors, stores tensors through hooks or reads nodes of the graph,
            which may change gradients.
        reads: How often Python reads values of a tensor.
        stores_through_hooks: Whether hooks decide what autograd stores, as in a checkpoint.
        places: For each place in the graph the tensor there; ``None`` if the places are not noted.
        backward: The calls of custom autograd functions in each backward pass, if places are noted.
    """

    def __init__(self, leaves: dict[int, tuple[str, int, int]] | None = None) -> None:
        self.sizes: list[int] = []
        self.has_hooks = self.stores_through_hooks = False
        self.reads = 0
        self.leaves = leaves or {}
        self.places: dict[tuple[Any, int], Hashable] | None = None
        self.backward: list[Outline] = []
        self._calls: list[Any] = []
        self._axes: list[int] = []
        self._hashed: tuple[int, int] | None = None
        self._values: list[Any] = []
        self._made: dict[int, tuple[ReferenceType[Tensor], Hashable, int]] = {}
        self._count = 0

    @property
    def number(self) -> int:
        """A number for the calls, their tensors and their sizes."""
        length = len(self._calls) + len(self.sizes)
        if self._hashed is None or self._hashed[0] != length:  # every further call makes the lists longer
            self._hashed = length, hash((*self._calls, *self._axes, repr(self.sizes)))
        return self._hashed[1]

    @property
    def path(self) -> int:
        """A number for the calls, their tensors and their constants, the same for all sizes unless the model branches on them."""
        return hash((*self._calls, *self._axes, *self._values))

    def has_calls_of(self, other: Outline) -> bool:
        """Return whether another forward pass makes the same calls, with the same tensors and constants, whatever axes results have."""
        return (self.reads, self._calls, self._values) == (other.reads, other._calls, other._values)

    @property
    def precisions(self) -> tuple[torch.dtype, ...]:
        """The floating types of all results, in the order of the calls."""
        return tuple(entry for entry in self._calls if isinstance(entry, torch.dtype) and entry.is_floating_point)

    def add(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Add one call."""
        outputs: Iterable[Tensor] = (result,) if type(result) is Tensor else tuple(tensors_in(result))
        traits = _traits(function)
        if traits.hooks and not _is_of_libraries():
            self.has_hooks = True
        self.reads += traits.reads
        if not outputs and (result is not None or traits.asserts):
            return
        calls = self._calls
        calls += (
            function,
            *kwargs,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            storing_hooks(True) and self._storing(),
        )
        values = (*args, *kwargs.values()) if kwargs else args
        is_size = traits.shapes or self._compares_numbers(values, outputs)
        for value in values:
            kind = type(value)
            if kind in _STRUCTURAL:
                calls.append(value)
            elif kind in _TENSORS or isinstance(value, Tensor):
                made = self._made.get(id(value))
                if made is not None and made[2] == version_of(value) and made[0]() is value:
                    calls.append(made[1])
                else:
                    calls.append(self._identity(value))
            else:
                self._add(
                    value, is_size and not (traits.fills and kind is not tuple and not isinstance(value, (tuple, list)))
                )
        for output in outputs:
            self._count += 1
            if id(output) not in self.leaves:  # ``weight.flatten(1)`` of a matrix returns the parameter in some passes
                self._made[id(output)] = ref(output), self._count, version_of(output)
            shape = output.shape
            calls.append(output.dtype)
            self._axes.append(len(shape))
            self.sizes += shape
        if self.places is not None:
            self._note_places((*values, *outputs))

    def _note_places(self, values: Any) -> None:
        """Note where tensors are in the graph. The results of a custom function have no place before it ends, but in their first use."""
        assert self.places is not None
        for tensor in tensors_in(values):
            node = tensor.grad_fn
            if node is not None:
                self.places.setdefault((node, tensor.output_nr), self.origin(tensor))

    def add_leaf(self, leaf: Tensor, parameter: Tensor) -> None:
        """Note that a pass uses another tensor in place of a parameter."""
        known = self.leaves.get(id(parameter))
        if known is not None:
            self.leaves[id(leaf)] = (*known[:2], version_of(leaf))

    def end(self, logits: Tensor) -> Outline:
        """Add which tensor the logits are: a dispatcher operator, which is not recorded, may have made or changed them."""
        origin, calls = self.origin(logits), self._calls
        if self.places is not None:
            self._note_places(logits)
        if origin == self._count and len(calls) > _ADDED_AXIS and calls[-_ADDED_AXIS] is torch.atleast_2d:
            # as_rows has added the sample axis, which is no call of the model
            origin = calls[-2]
            del calls[-_ADDED_AXIS:], self._axes[-1:], self.sizes[-2:]
        calls.append(origin or "unknown")
        return self

    def _storing(self) -> str:
        """Return the name of the hook that decides what autograd stores; one that is not part of torch may change gradients."""
        self.stores_through_hooks = True
        pack, _ = storing_hooks(True) or (None, None)
        name = f"{getattr(pack, '__module__', '')}.{getattr(pack, '__qualname__', type(pack).__qualname__)}"
        if not name.startswith("torch."):
            self.has_hooks = True
        return name

    def _compares_numbers(self, values: tuple[Any, ...], outputs: Iterable[Tensor]) -> bool:
        """Return whether a call computes a number from numbers, as in ``mask.sum() == mask.numel()``."""
        for output in outputs:
            if output.ndim:
                return False
        if not values or not isinstance(values[0], Tensor):
            return False
        return not any(tensor.ndim for tensor in tensors_in(values))

    def _add(self, value: Any, is_size: bool) -> None:
        """Add an argument to the sizes or to the constants."""
        kind = type(value)
        if kind is int and is_size:
            self.sizes.append(value)
        elif kind in _STRUCTURAL:
            self._calls.append(value)
        elif kind in (int, bool):
            self._calls.append(repr(value))  # the hashes of -1 and -2 are equal, and integers are numbers of results
        elif isinstance(value, Tensor):
            self._calls.append(self._identity(value))
        elif kind is slice:
            for end in (value.start, value.stop, value.step):
                self._add(end, is_size)
        elif isinstance(value, (tuple, list)):
            self._calls.append(len(value))
            for entry in value:
                self._add(entry, is_size)
        elif isinstance(value, Mapping):
            self._calls += map(str, value)
            for entry in value.values():
                self._add(entry, is_size)
        else:
            content = getattr(value, "tobytes", None)  # an array of numpy
            self._values.append((kind, content() if content is not None else repr(value)))

    def _identity(self, tensor: Tensor) -> Hashable:
        """Return where a tensor comes from, and note the values of one of unknown origin."""
        origin = self.origin(tensor)
        if origin is None:
            self._values.append(_content(tensor))
            return "unknown"
        return origin

    def origin(self, tensor: Tensor) -> Hashable:
        """Return where a tensor comes from; ``None`` if that is unknown."""
        made = self._made.get(id(tensor))
        if made is not None and made[0]() is tensor:
            changes = version_of(tensor) - made[2]  # in place, possibly by an operator that is not recorded
            return (made[1], changes) if changes else made[1]
        leaf = self.leaves.get(id(tensor))
        if leaf is None:
            return None
        kind, number, version = leaf
        changes = version_of(tensor) - version
        return (kind, number, changes) if changes else (kind, number)


_ADDED_AXIS = 6
"""Number of entries of a call of ``torch.atleast_2d``."""


class _Traits(NamedTuple):
    """What the name of a function tells.

    Args:
        hooks: Whether it may change how gradients are computed.
        reads: Whether it returns values of a tensor to Python.
        shapes: Whether its integer arguments may depend on the sizes of the inputs.
        fills: Whether its plain numbers are values of the result.
        asserts: Whether it is an assertion, which returns nothing.
    """

    hooks: bool
    reads: bool
    shapes: bool
    fills: bool
    asserts: bool


@lru_cache(maxsize=1024)
def _traits(function: Any) -> _Traits:
    name = getattr(function, "__name__", "")
    is_hooking = name in _HOOKING or function == _NODE
    return _Traits(is_hooking, name in HOST_READS, name in _SHAPING, name in _FILLING, name == "_assert")


def _is_of_libraries() -> bool:
    """Return whether torch or Fabric registers a hook or reads a node, as for counters: these change no gradients."""
    frame = sys._getframe(1)
    while frame is not None and _is_passed_through(frame):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and str(frame.f_globals.get("__name__", "")).startswith(_LIBRARIES)


def _is_passed_through(frame: FrameType) -> bool:
    """Return whether a frame is of the engine and its modes, or of torch between a caller and the engine."""
    module = str(frame.f_globals.get("__name__", ""))
    return module.startswith(_OWN) or module == "torch.overrides" or frame.f_code.co_name in _HOOKING


_LIBRARIES = ("torch.", "lightning.fabric.", "lightning_fabric.")
"""Modules whose hooks change no gradients."""

_OWN = (__name__.partition(".tracing.")[0] + ".", norm_gradients.__name__, tensor_records.__name__)
"""The package of the engine, and the modules of function modes that run with the engine's."""


def _content(tensor: Tensor) -> str:
    """Return the values of a small tensor of unknown origin; a number for a larger one, new for each tensor."""
    try:
        with torch._C.DisableTorchFunction(), torch.no_grad(), _disable_current_modes():
            if tensor.numel() <= MOST_ENTRIES:
                return repr((tuple(tensor.shape), tensor.detach().flatten().tolist()))
            if tensor not in _UNKNOWN:
                _UNKNOWN[tensor] = next(_NUMBERS)
            return f"tensor {_UNKNOWN[tensor]}"
    except (RuntimeError, TypeError):  # a tensor without readable values, such as one of torch.func
        return f"tensor {next(_NUMBERS)}"


def _only_checks(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call is ``one_hot`` with a number of classes, without which the values determine that number."""
    if func is not torch._C._nn.one_hot:
        return False
    count = kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
    return type(count) is int and count > 0


class Recording(TorchFunctionMode):
    """Records every torch call inside the block in an outline.

    Args:
        outline: The outline.

    Attributes:
        depth: How many recorded calls are running.
        only_checks: Whether a call is running that reads values only to check its arguments.
    """

    def __init__(self, outline: Outline) -> None:
        super().__init__()
        self.outline, self.depth, self.only_checks = outline, 0, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call and record it."""
        kwargs = kwargs or {}
        # A dispatcher operator is not a call of the model: a dispatch mode makes or repeats it.
        if type(func) is torch._ops.OpOverload:
            return func(*args, **kwargs)
        self.depth += 1
        self.only_checks = _only_checks(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        finally:
            self.depth -= 1
            self.only_checks = False
        with torch._C.DisableTorchFunction():  # other modes would intercept even the reading of a shape
            self.note(func, args, kwargs, result)
        return result

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Record one call."""
        self.outline.add(func, args, kwargs, result)
