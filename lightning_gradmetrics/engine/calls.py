"""Reads and rewrites the arguments of intercepted calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = [
    "NEVER_NESTED",
    "OpeningMode",
    "Outline",
    "Silence",
    "has_tensors",
    "made_contiguous",
    "map_arguments",
    "opened",
    "tensors_in",
]

DECOMPOSED: dict[Any, Callable[..., Any]] = {}
"""Replacements of fused functions: equivalent functions made of calls that have rules."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Iterate over every tensor in nested tuples, lists and mappings, in order and with repeats."""
    found: list[Tensor] = []
    _collect_tensors(value, found)
    return iter(found)


_PLAIN_TYPES = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size})
"""Types of values without tensors, which most arguments have."""


NEVER_NESTED = _PLAIN_TYPES | {Tensor, nn.Parameter}
"""Types of values that contain no other tensors."""


def _collect_tensors(value: Any, found: list[Tensor]) -> None:
    """Append every tensor in a nested value to a list, which is faster than nested generators."""
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            if type(item) not in _PLAIN_TYPES:
                _collect_tensors(item, found)
    elif type(value) not in _PLAIN_TYPES and isinstance(value, Mapping):
        for item in value.values():
            _collect_tensors(item, found)


def has_tensors(value: Any) -> bool:
    """Return whether there is a tensor in nested tuples, lists and mappings."""
    return next(tensors_in(value), None) is not None


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


_VIEWS = "view reshape expand unflatten flatten split chunk narrow repeat tile as_strided select __getitem__"
_NEW = "new_zeros new_ones new_full zeros ones full empty arange"
SHAPING = frozenset([*_VIEWS.split(), *_NEW.split(), "_assert"])
"""Functions whose integer or text arguments may depend on the sizes of the inputs."""


class Outline:
    """Hashes of the calls of a forward pass: its outline and its path.

    The outline depends on the functions and on their integer and text arguments. The path depends on all numbers except
    the integers of functions that set a shape, so it is the same for all batch sizes and lengths unless the model
    branches on them.
    """

    def __init__(self) -> None:
        self._calls: list[Any] = []
        self._constants: list[Any] = []

    @property
    def outline(self) -> int:
        """The number for the functions and their sizes."""
        return hash(tuple(self._calls))

    @property
    def path(self) -> int:
        """The number for the functions and their constants."""
        return hash(tuple(self._constants))

    def add(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Add one call."""
        self._calls += (function, *kwargs)
        self._constants += (function, *kwargs)
        for value in (*args, *kwargs.values()) if kwargs else args:
            if type(value) not in _WITHOUT_CONSTANTS:
                self._add_constant(value, getattr(function, "__name__", "") in SHAPING)

    def _add_constant(self, value: Any, is_size: bool) -> None:
        kind = type(value)
        if kind in (int, bool, str):
            self._calls.append(value)
        elif kind is tuple:
            self._calls += [entry for entry in value if type(entry) is int]
        if kind in (float, bool) or (kind in (int, str) and not is_size):
            self._constants.append(value)
        elif kind in (tuple, list) and not is_size:
            self._constants.append(repr([entry for entry in value if type(entry) in (int, float, bool)]))


_WITHOUT_CONSTANTS = frozenset({Tensor, nn.Parameter, type(None)})
"""The types of most arguments."""


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
    """A torch function mode that also intercepts the calls inside Python functions and decomposed functions."""

    active: ClassVar[int] = 0
    """The number of active modes of this kind."""

    def __init__(self) -> None:
        super().__init__()
        self._open: list[Any] = []

    def __enter__(self) -> OpeningMode:
        OpeningMode.active += 1
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        OpeningMode.active -= 1
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _opens(self, function: Any) -> bool:
        """Return whether to intercept the calls inside a function; not inside the second call of one that calls itself."""
        return (isinstance(function, FunctionType) or function in DECOMPOSED) and function not in self._open

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
        self._open = [torch._C.DisableTorchFunction(), torch.no_grad()]
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
