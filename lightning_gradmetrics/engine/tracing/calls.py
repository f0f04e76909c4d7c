"""Reads and rewrites the arguments of intercepted calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from types import FunctionType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = [
    "HOST_READS",
    "NEVER_NESTED",
    "PLAIN_TYPES",
    "OpeningMode",
    "Silence",
    "has_tensors",
    "made_contiguous",
    "map_arguments",
    "opened",
    "sources_in",
    "tensors_in",
]

Name = TypeVar("Name")

HOST_READS = frozenset(
    [
        "item",
        "tolist",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__complex__",
        "__contains__",
        "numpy",
        "__array__",
        "is_nonzero",
        "equal",
        "allclose",
        "__repr__",
        "__format__",
        "__reduce_ex__",
        "__dlpack__",
        "untyped_storage",
        "data_ptr",
    ]
)
"""Names of functions that return values of a tensor to Python, where the model may branch on them."""

DECOMPOSED: dict[Any, Callable[..., Any]] = {}
"""Replacements of fused functions: equivalent functions made of calls that have rules."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Iterate over every tensor in nested tuples, lists and mappings, in order and with repeats."""
    tensors: list[Tensor] = []
    _collect_tensors(value, tensors)
    return iter(tensors)


PLAIN_TYPES = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.Size})
"""Types of values without tensors, which most arguments have."""

_TENSORS = frozenset({Tensor, nn.Parameter})

NEVER_NESTED = PLAIN_TYPES | _TENSORS
"""Types of values that contain no other tensors."""


def _collect_tensors(value: Any, found: list[Tensor]) -> None:
    """Append every tensor in a nested value to a list, which is faster than nested generators."""
    kind = type(value)
    if kind in _TENSORS:
        found.append(value)
    elif kind in PLAIN_TYPES:
        return
    elif kind is tuple or kind is list:
        _collect_from_all(value, found)
    elif kind is dict:
        _collect_from_all(value.values(), found)
    elif isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        _collect_from_all(value, found)
    elif isinstance(value, Mapping):
        _collect_from_all(value.values(), found)


def _collect_from_all(values: Iterable[Any], found: list[Tensor]) -> None:
    for value in values:
        kind = type(value)
        if kind in _TENSORS:
            found.append(value)
        elif kind not in PLAIN_TYPES:
            _collect_tensors(value, found)


def has_tensors(value: Any) -> bool:
    """Return whether there is a tensor in nested tuples, lists and mappings."""
    return next(tensors_in(value), None) is not None


def sources_in(tracked: Mapping[int, Name], args: Any, kwargs: Mapping[str, Any]) -> tuple[Name, ...]:
    """Return the names of the tracked tensors among the arguments of a call, in order.

    Args:
        tracked: The names, by the identity of the tensor.
        args: The positional arguments.
        kwargs: The keyword arguments.
    """
    sources: list[Name] = []
    _collect_sources(tracked, (*args, *kwargs.values()) if kwargs else args, sources)
    return tuple(sources)


def _collect_sources(tracked: Mapping[int, Name], values: Iterable[Any], sources: list[Name]) -> None:
    """Append the names of the tracked tensors in nested values to a list."""
    for value in values:
        source = tracked.get(id(value))
        kind = type(value)
        if source is not None:
            sources.append(source)
        elif kind is list or kind is tuple:
            _collect_sources(tracked, value, sources)
        elif kind not in NEVER_NESTED:
            sources += [tracked[id(t)] for t in tensors_in(value) if id(t) in tracked]


def map_arguments(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return the nested value with ``function`` applied to each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    is_plain = type(value) in (tuple, list)
    if is_plain or (isinstance(value, tuple) and hasattr(value, "_fields")):
        items = [map_arguments(function, item) for item in value]
        return type(value)(items) if is_plain else type(value)(*items)
    if type(value) is dict:
        return {key: map_arguments(function, item) for key, item in value.items()}
    return value


def made_contiguous(chosen: Tensor, tensor: Tensor) -> Tensor:
    """Return a contiguous copy of one chosen argument, and any other argument unchanged."""
    return tensor.contiguous() if tensor is chosen else tensor


def _never(*_: Any) -> bool:
    return False


@lru_cache(maxsize=512)
def opened(function: Any) -> Callable[..., Any]:
    """Return a composite torch function without its override check, so that the calls inside it are intercepted.

    A torch function mode is inactive while it handles a call. Calling the function with the mode active again would
        intercept the same call forever; the copy made here runs the body directly.
    """
    checks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    scope = {**function.__globals__, **dict.fromkeys(checks, _never)}
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class OpeningMode(TorchFunctionMode):
    """A torch function mode that also intercepts the calls inside Python functions and decomposed functions.

    Attributes:
        whole: Functions that are not decomposed.
    """

    active: ClassVar[int] = 0
    """The number of active modes of this kind."""

    def __init__(self) -> None:
        super().__init__()
        self._open: list[Any] = []
        self.whole: frozenset[Any] = frozenset()

    def __enter__(self) -> OpeningMode:
        OpeningMode.active += 1
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        OpeningMode.active -= 1
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _opens(self, function: Any) -> bool:
        """Return whether to intercept the calls inside a function; not inside the second call of one that calls itself."""
        opens = isinstance(function, FunctionType) or function in DECOMPOSED
        return opens and function not in self._open and function not in self.whole

    def _inside(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Return the function's result, with the calls inside it intercepted."""
        self._open.append(function)
        try:
            with self:
                return (DECOMPOSED.get(function) or opened(function))(*args, **kwargs)
        finally:
            self._open.pop()


class Silence:
    """Disables call interception, gradients and autocast while the engine computes; blocks may be nested.

    While a mode is active, it intercepts even the reading of a shape.

    Args:
        device: The type of the device.
    """

    def __init__(self, device: str) -> None:
        self.depth = 0
        self._device = device
        self._open: list[Any] = []

    def __enter__(self) -> None:
        self.depth += 1
        if self.depth > 1:
            return
        self._open = [torch._C.DisableTorchFunction()]
        if torch.is_grad_enabled():  # not in a backward pass
            self._open.append(torch.no_grad())
        if torch.is_autocast_enabled(self._device):
            self._open.append(torch.autocast(self._device, enabled=False))
        for context in self._open:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.depth -= 1
        if self.depth > 0:
            return
        for context in reversed(self._open):
            context.__exit__(*error)
        self._open = []
