"""Records one step of a model: copies of the calls of the model and of its layers."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import Inputs, as_rows, logits_in, map_tensors, tensors_in
from lightning_gradmetrics.classifier.head import LayerCall
from lightning_gradmetrics.classifier.label_choice import LABEL_ARGUMENTS

__all__ = [
    "ModelCall",
    "Observation",
    "arguments_of",
    "joined_inputs",
    "observing",
    "redirected",
    "whole_modules",
]


@dataclass
class ModelCall:
    """One call of the model.

    Args:
        inputs: Its arguments, tensors copied before the model could change them.
        received: The tensors among its arguments, not copied.
        logits: A copy of its logits ``(N, C)``, or ``(C,)`` of one sample; ``None`` if its output has none.
        problem: The error that explains why there are no logits.
    """

    inputs: Inputs
    received: Sequence[Tensor]
    logits: Tensor | None = None
    problem: Exception | None = None

    def received_inputs(self) -> list[Tensor]:
        """Return the received tensors without those that the step passed by a name of labels, for the model's own loss.

        Example:
            >>> x, y = torch.zeros(2, 3), torch.tensor([0, 1])
            >>> ModelCall({0: x, "labels": y}, [x, y]).received_inputs()[0] is x
            True
        """
        if not isinstance(self.inputs, Mapping):
            return list(self.received)
        tensors, remaining = iter(self.received), []
        for name, value in self.inputs.items():
            of_argument = [next(tensors) for _ in tensors_in(value)]
            if name not in LABEL_ARGUMENTS:
                remaining += of_argument
        return remaining


@dataclass
class Observation:
    """The calls of one step.

    Args:
        models: The calls of each module that contains all of the model's parameters, outermost first.
        layers: The calls of the observed layers, in order.
        autocast: The device, the data type and whether it was enabled, of the autocast context of the first call.
    """

    models: dict[nn.Module, list[ModelCall]] = field(default_factory=dict)
    layers: list[LayerCall] = field(default_factory=list)
    autocast: tuple[str, torch.dtype, bool] | None = None

    @property
    def called(self) -> tuple[nn.Module, list[ModelCall]] | None:
        """The outermost module that was called as a whole, with its calls; ``None`` if none was called."""
        for module, calls in self.models.items():
            if calls:
                return module, calls
        return None

    def note_autocast(self, values: Any) -> None:
        """Record the autocast context of the first call with a tensor."""
        device = next((value.device.type for value in values if isinstance(value, Tensor)), None)
        if self.autocast is None and device in ("cpu", "cuda"):
            self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def surroundings(self) -> AbstractContextManager[Any]:
        """Return the autocast context in which the model was called; an empty one if that is the current context."""
        if self.autocast is None:
            return nullcontext()
        device, dtype, is_enabled = self.autocast
        if (torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)) == (dtype, is_enabled):
            return nullcontext()
        return torch.autocast(device, dtype, enabled=is_enabled)

    def of_layer(self, name: str) -> list[LayerCall]:
        """Return the calls of one layer."""
        return [call for call in self.layers if call.name == name]


def whole_modules(model: nn.Module) -> list[nn.Module]:
    """Return the model and the modules inside it that contain all of its parameters, outermost first.

    Example:
        >>> inner = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        >>> [type(module).__name__ for module in whole_modules(nn.Sequential(inner, nn.Softmax(1)))]
        ['Sequential', 'Sequential']
    """
    modules, total = [model], len(list(model.parameters()))
    while total:
        for child in modules[-1].children():
            if len(list(child.parameters())) == total:
                modules.append(child)
                break
        else:
            return modules
    return modules


def arguments_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
    """Return the arguments of a call as inputs: a tensor, positional arguments, keyword arguments, or both in one mapping.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.

    Example:
        >>> arguments_of((1, 2), {}), arguments_of((), {"a": 1}), arguments_of((1,), {"a": 2})
        ((1, 2), {'a': 1}, {0: 1, 'a': 2})
    """
    if not kwargs:
        return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else tuple(args)
    merged: dict[Any, Any] = dict(enumerate(args))
    merged.update(kwargs)
    return merged


def _as_tensor(module: nn.Module, inputs: Inputs) -> Inputs:
    """Return the tensor if it is the only argument and fills the forward's first parameter, otherwise the inputs."""
    if not isinstance(inputs, Mapping) or len(inputs) != 1:
        return inputs
    ((name, value),) = inputs.items()
    try:
        bound = inspect.signature(module.forward).bind(**inputs)
    except (TypeError, ValueError):
        return inputs
    return value if isinstance(value, Tensor) and name in bound.arguments and bound.args else inputs


@contextmanager
def observing(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    logits_fn: Callable[[Any], Tensor],
    whole: Sequence[nn.Module] | None = None,
) -> Iterator[Observation]:
    """Observe the model inside the block; every hook is removed after it.

    Args:
        model: The model.
        layers: The layers to observe, by name.
        logits_fn: Returns the logits ``(N, C)`` from the model's output.
        whole: The result of :func:`whole_modules`, if it is known.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> with observing(model, {"0": model[0]}, lambda output: output) as seen:
        ...     _ = model(torch.zeros(4, 3))
        >>> len(seen.layers), seen.called[1][0].logits.shape
        (1, torch.Size([4, 2]))
    """
    if not _has_hooks(model):
        raise TypeError(
            f"{type(model).__name__} is scripted, and calls of a ScriptModule cannot be observed. Score the original model, or a "
            "module whose forward calls the scripted one"
        )
    observation, removals = Observation(), []
    running: list[_RunningCall] = []
    try:
        for name, layer in layers.items():
            if _has_hooks(layer):
                removals.append(_observe_layer(observation, name, layer, running))
        for module in filter(_has_hooks, whole_modules(model) if whole is None else whole):
            observation.models[module] = []
            removals += _observe_model(observation, module, logits_fn, running)
        yield observation
    finally:
        for remove in removals:
            remove()


def _has_hooks(module: nn.Module) -> bool:
    """Return whether hooks can be registered, which scripted modules do not allow."""
    return not isinstance(module, torch.jit.RecursiveScriptModule)  # type: ignore[attr-defined]


def _observe_layer(
    seen: Observation, name: str, layer: nn.Module, running: Sequence[_RunningCall]
) -> Callable[[], None]:
    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        layer_input = args[0] if args else next(iter(kwargs.values()), None)
        if seen.autocast is None:
            seen.note_autocast([layer_input])
        seen.layers.append(_layer_call(name, layer_input, output, is_inside=bool(running)))

    return layer.register_forward_hook(after, with_kwargs=True).remove


def _layer_call(name: str, given: Any, output: Any, *, is_inside: bool) -> LayerCall:
    shapes: list[tuple[int, ...] | None] = []
    for value in (given, output):
        has_shape = isinstance(value, Tensor) and not value.is_nested  # torch's encoder layers may pass nested tensors
        shapes.append(tuple(value.shape) if has_shape else None)
    lengths = [len(shape) for shape in shapes if shape is not None]
    of_input, of_output = shapes
    if lengths not in ([2, 2], [1, 1]):
        return LayerCall(name, None, None, of_input, of_output, is_inside)
    features, rows = as_rows(given.detach().clone()), as_rows(output.detach().clone())
    return LayerCall(name, features, rows, of_input, of_output, is_inside)


@dataclass(frozen=True)
class _RunningCall:
    """A call that has not returned yet.

    Args:
        module: The module.
        call: The call, or ``None`` inside another call of the model, which is recorded instead.
        handled: The exception that was being handled when it began.
    """

    module: nn.Module
    call: ModelCall | None
    handled: BaseException | None


def _observe_model(
    seen: Observation, module: nn.Module, logits_fn: Callable[[Any], Tensor], running: list[_RunningCall]
) -> list[Callable[[], None]]:
    """Register hooks that record each call of a module except nested ones; return functions that remove them.

    A call that raises is forgotten: the step may catch the error and call the model again.
    """
    calls = seen.models[module]

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = None if running else _copied_call(seen, module, args, kwargs)
        running.append(_RunningCall(module, call, sys.exc_info()[1]))

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not running or running[-1].module is not module:  # another hook raised before the call began
            return
        ended = running.pop()
        has_raised = sys.exc_info()[1] is not ended.handled
        if ended.call is None or has_raised:
            return
        try:
            ended.call.logits = _copied_logits(_logits(logits_fn, output))
        except Exception as problem:  # raised later, if these logits are needed
            ended.call.problem = problem
        calls.append(ended.call)

    return [
        module.register_forward_pre_hook(before, with_kwargs=True).remove,
        module.register_forward_hook(after, with_kwargs=True, always_call=True).remove,
    ]


def _copied_call(seen: Observation, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall:
    """Return the arguments of a call, copied before the model can change them."""
    received: list[Tensor] = []

    def copied(tensor: Tensor) -> Tensor:
        received.append(tensor)
        return tensor.detach().clone()

    inputs = map_tensors(_as_tensor(module, arguments_of(args, kwargs)), copied)
    if seen.autocast is None:
        seen.note_autocast(received)
    return ModelCall(inputs, received)


def _logits(logits_fn: Callable[[Any], Tensor], output: Any) -> Any:
    """Return what ``logits_fn`` returns; an error of the user's function says that it is one."""
    if logits_fn is logits_in:
        return logits_in(output)
    try:
        return logits_fn(output)
    except Exception as problem:
        raise ValueError(
            f"logits_fn failed for an output of type {type(output).__name__} with {type(problem).__name__}: {problem}. It takes the "
            "model's output and returns the logits (N, C)"
        ) from problem


def _copied_logits(logits: Any) -> Tensor:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits_fn returned a {type(logits).__name__}; expected a tensor (N, C), one row per sample")
    return logits.detach().clone()


@contextmanager
def redirected(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """Redirect calls of the model to one module inside it.

    Args:
        model: The model.
        module: The model itself, or a module inside it.
    """
    if module is model:
        yield
        return
    own = model.__dict__.get("forward")
    model.forward = module.__call__
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def joined_inputs(parts: Sequence[Inputs], rows: Sequence[int]) -> Inputs | None:
    """Concatenate the inputs of several calls along the first axis; return ``None`` if that is impossible.

    Args:
        parts: The inputs of each call.
        rows: The number of samples of each call.

    Example:
        >>> joined_inputs([torch.zeros(2, 3), torch.ones(1, 3)], [2, 1]).shape
        torch.Size([3, 3])
    """
    first = parts[0]
    if isinstance(first, Tensor):
        return _joined_tensors(parts, rows)
    joined: dict[Any, Any] = {}
    for key in first if isinstance(first, Mapping) else range(len(first)):
        values = [inputs_of_call[key] for inputs_of_call in parts]  # type: ignore[index]
        joined[key] = _joined_tensors(values, rows) if isinstance(values[0], Tensor) else values[0]
        is_one = joined[key] is not None or values[0] is None
        if not is_one or (not isinstance(values[0], Tensor) and values.count(values[0]) < len(values)):
            return None
    return joined if isinstance(first, Mapping) else tuple(joined.values())


def _joined_tensors(parts: Sequence[Any], rows: Sequence[int]) -> Tensor | None:
    """Concatenate the tensors if each has one row per sample of its call; otherwise return ``None``."""
    for value, size in zip(parts, rows, strict=True):
        is_fitting = isinstance(value, Tensor) and value.ndim and len(value) == size
        if not is_fitting or value.shape[1:] != parts[0].shape[1:]:
            return None
    return torch.cat(list(parts))
