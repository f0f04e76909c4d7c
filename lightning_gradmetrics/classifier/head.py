"""The classification head: the layer that maps features ``(N, D)`` to the logits ``(N, C)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import as_rows, gradients_enabled

__all__ = [
    "Head",
    "HeadNotFoundError",
    "LayerCall",
    "find_head",
    "head_of",
    "linear_layers",
    "named_layer",
    "returning_logits",
]

CHECKED_ROWS = 16
"""Number of rows on which a layer's output is compared with the product with its weight."""

ROUNDING = 32
"""Number of rounding errors by which a layer's output may differ from the product with its weight."""


class HeadNotFoundError(ValueError):
    """The model's classification head could not be found."""


@dataclass(frozen=True)
class Head:
    """A classification head: ``logits = features @ weight.T + bias``.

    Args:
        name: Name of the layer in the model.
        weight: Weight ``(C, D)``.
        bias: Bias ``(C,)``, or ``None``.
    """

    name: str
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer, recorded by a hook.

    Args:
        name: The layer's name in the model.
        features: A copy of its input if that is ``(N, D)``, or ``(1, D)`` if input and output are vectors; otherwise ``None``.
        output: A copy of its output if that is ``(N, C)``, or ``(1, C)`` of a vector; otherwise ``None``.
        input_shape: The shape of its input, or ``None`` if that is not a tensor.
        output_shape: The shape of its output, or ``None`` if that is not a tensor.
        is_inside: Whether it is part of a call of the whole model.
    """

    name: str
    features: Tensor | None
    output: Tensor | None
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    is_inside: bool = False


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def named_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the layer of that name.

    Raises:
        HeadNotFoundError: If the model has no such layer.
    """
    layer: nn.Module | None = model
    for part in name.split("."):
        layer = None if layer is None else layer._modules.get(part)
    if layer is not None:
        return layer
    try:
        return model.get_submodule(name)
    except AttributeError:
        problem = f"{type(model).__name__} has no linear layer {name!r}; {_layers(model)}"
        raise HeadNotFoundError(f"head={name!r}: {problem}") from None


def _layers(model: nn.Module) -> str:
    layers = list(linear_layers(model))
    if not layers:
        return "it has no linear layer: choose scores that need no head, or another target, such as 'all'"
    return f"its linear layers are: {', '.join(layers[-12:])}"


# From the calls of one step to the head


def find_head(model: nn.Module, calls: Sequence[LayerCall], logits: Tensor) -> str:
    """Return the name of the layer whose output is the model's logits.

    A layer that wraps a linear layer and adds to its output, such as LoRA, is preferred to the layer inside it. A layer that
    the model calls is preferred to one that the step calls directly, such as that of a teacher with the same weights.

    Args:
        model: The model.
        calls: The calls of its layers in one forward pass.
        logits: The logits of the forward pass ``(N, C)``.

    Raises:
        HeadNotFoundError: If there is no such layer, or more than one.
    """
    equal = [call for call in calls if _returns(call, logits)]
    names = _names(model, equal, calls, logits)
    if len(names) > 1:
        names = _names(model, [call for call in equal if call.is_inside], calls, logits) or names
    if len(names) > 1:
        raise HeadNotFoundError(
            f"several layers of {type(model).__name__} return its logits: {', '.join(names)}. Pass one of them "
            f"as its head, such as head={names[0]!r}"
        )
    if not names:
        raise HeadNotFoundError(_not_found(model, calls, logits))
    return names[0]


def _names(model: nn.Module, equal: Sequence[LayerCall], calls: Sequence[LayerCall], logits: Tensor) -> list[str]:
    """Return the layers among those whose output is the logits that may be the head."""
    return _linear_names(model, equal) or _wrapper_names(model, equal, calls) or _custom_names(model, equal, logits)


def _returns(call: LayerCall, logits: Tensor) -> bool:
    """Return whether the call returned the logits."""
    output = call.output
    if output is None or call.features is None or output.shape != logits.shape:
        return False
    return _same(output.to(logits.dtype), logits)


def _linear_names(model: nn.Module, equal: Sequence[LayerCall]) -> list[str]:
    """Return the linear layers that return the logits, each replaced by the wrapper that adds parameters to it."""
    linear = linear_layers(model)
    names: dict[str, None] = {}
    for call in equal:
        if call.name in linear:
            names[_outermost(model, call, equal)] = None
    return list(names)


def _outermost(model: nn.Module, call: LayerCall, equal: Sequence[LayerCall]) -> str:
    """Return the outermost layer with the same input and output as a call, and with additional parameters."""
    outermost, around = call.name, call.name
    while "." in around:
        around = around.rpartition(".")[0]
        outer = _call_of(around, equal)
        if outer is None or not _same(outer.features, call.features):
            break
        if _parameters(model, around) > _parameters(model, outermost) and _is_affine(model, outer):
            outermost = around
    return outermost


def _wrapper_names(model: nn.Module, equal: Sequence[LayerCall], calls: Sequence[LayerCall]) -> list[str]:
    """Return the innermost layer that returns the logits and passes its input to a linear layer inside."""
    linear = linear_layers(model)
    smallest: list[LayerCall] = []
    for outer in equal:
        for inner in calls:
            is_inside = inner.name in linear and inner.name.startswith(f"{outer.name}.")
            if is_inside and _same(inner.features, outer.features) and _is_affine(model, outer):
                smallest.append(outer)
                break
    if not smallest:
        return []
    return [min(smallest, key=lambda call: _parameters(model, call.name)).name]


def _custom_names(model: nn.Module, equal: Sequence[LayerCall], logits: Tensor) -> list[str]:
    """Return layers that compute a linear map but are not ``nn.Linear``, such as quantised and custom layers."""
    names: dict[str, None] = {}
    for call in equal:
        is_leaf = next(model.get_submodule(call.name).children(), None) is None
        if is_leaf and call.name and _parameters(model, call.name) and _is_affine(model, call):
            names[call.name] = None
    return list(names)


def _call_of(name: str, calls: Sequence[LayerCall]) -> LayerCall | None:
    for call in calls:
        if call.name == name:
            return call
    return None


def _parameters(model: nn.Module, name: str) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(name).parameters())


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None or first.shape != second.shape:
        return False
    return torch.equal(first.nan_to_num(), second.nan_to_num())


def _is_affine(model: nn.Module, call: LayerCall) -> bool:
    try:
        head_of(model, call)
    except HeadNotFoundError:
        return False
    return True


def _not_found(model: nn.Module, calls: Sequence[LayerCall], logits: Tensor) -> str:
    """Return why no layer was found and what to do; a layer is proposed only if its output turns into the logits."""
    start = f"the head of {type(model).__name__} could not be found: "
    hidden, columns, everywhere = None, None, None
    classes, linear = logits.shape[1], linear_layers(model)
    for call in calls:
        if call.name not in linear:
            continue
        if call.output is not None and call.output.shape == logits.shape and _becomes(call.output, logits):
            hidden = call.name
        if call.output is not None and call.output.shape[1] == 1:
            columns = call.name
        shape = call.output_shape
        if shape is not None and len(shape) > 2 and shape[-1] == classes:
            everywhere = call
    if hidden is not None:
        return f"{start}a softmax or a scaling follows the layer {hidden!r}; pass head={hidden!r} to score its output"
    if everywhere is not None:
        return (
            f"{start}the layer {everywhere.name!r} is applied to every token or position: its input has the shape "
            f"{everywhere.input_shape}, and the closed forms need features (N, D). Take its gradient by a backward pass, as "
            f"in gradnorm(target='{everywhere.name}.weight')"
        )
    if columns is not None and classes == 2:
        return (
            f"{start}the layer {columns!r} has one output z, and logits_fn makes two columns of it. Let logits_fn return z "
            f"alone (N, 1), which is scored as the logits (0, z) with the gradient of that layer's one row, or take "
            f"target='{columns}.weight'"
        )
    if not linear_layers(model):
        return f"{start}{_layers(model)}"
    return (
        f"{start}no linear layer's output is what the model returns; {_layers(model)}. If the output of one of them is "
        "the logits, name it with head=; otherwise take target='all' or a pattern of parameter names instead of the head"
    )


def _becomes(output: Tensor, logits: Tensor) -> bool:
    """Return whether the logits are a softmax, a log-softmax or a positive multiple of the output."""
    z, target = output.double(), logits.double()
    for made in (z.softmax(1), z.log_softmax(1)):
        if torch.allclose(made, target, rtol=1e-4, atol=1e-6):
            return True
    scale = float((z * target).sum() / (z * z).sum().clamp_min(1e-30))
    return scale > 0 and torch.allclose(scale * z, target, rtol=1e-4, atol=1e-6)


# The head's weight and bias


def head_of(model: nn.Module, call: LayerCall) -> Head:
    """Return the head of a call, with the weight and bias that reproduce its output.

    They are the layer's own parameters, or those of the affine map that the layer computes (such as LoRA).

    Raises:
        HeadNotFoundError: If the call is not an affine map of features ``(N, D)``, or if the gradient of a linear layer's weight is not
            that of this map's weight.
    """
    if call.features is None or call.output is None:
        raise HeadNotFoundError(
            f"the head {call.name!r} has an input of shape {call.input_shape}; the closed forms need pooled features "
            f"(N, D). Take its gradient by a backward pass, as in gradnorm(target='{call.name}.weight')"
        )
    layer = named_layer(model, call.name)
    if isinstance(layer, nn.Linear):
        weight, bias = _whole(layer.weight), None if layer.bias is None else _whole(layer.bias)
        if _reproduces(weight, bias, call):
            return Head(call.name, weight, bias)
    if type(layer).forward is nn.Linear.forward and not layer._forward_hooks:
        raise HeadNotFoundError(
            f"the weight of the layer {call.name!r} does not produce the output of its call: weights were changed or replaced "
            "in the step, by an update or by functional_call. Change them outside the step, or choose scores of the logits, "
            "such as max_softmax"
        )
    made = _affine_map(layer, call.features)
    if made is None or not _reproduces(*made, call):
        raise HeadNotFoundError(
            f"the layer {call.name!r} is not a linear function of its input, so it cannot be the head of the closed "
            "forms. Take its gradient by a backward pass, as in target='all'"
        )
    if not _has_gradient_of_map(layer, call.features[:CHECKED_ROWS]):
        raise HeadNotFoundError(
            f"the gradient of the weight of the layer {call.name!r} is not that of the linear function which the layer computes, "
            f"as when a hook scales its output. Take it by a backward pass, as in gradnorm(target='{call.name}.weight')"
        )
    return Head(call.name, *made)


def _has_gradient_of_map(layer: nn.Module, features: Tensor) -> bool:
    """Return whether the gradient of a linear layer's own weight is that of the weight of its affine map, as with LoRA added to it."""
    own = dict(layer.named_parameters(recurse=False)).get("weight")
    if not isinstance(layer, nn.Linear) or own is None or not own.is_floating_point():
        return True
    with gradients_enabled():  # the features are cloned, because a step may have made them in inference mode
        weight = own.detach().clone().requires_grad_()
        output = torch.func.functional_call(layer, {"weight": weight}, (features.clone(),))
        if not output.requires_grad:
            return True
        g = torch.linspace(-1, 2, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
        (found,) = torch.autograd.grad(output, weight, g, allow_unused=True)
    if found is None:
        return True
    expected = g.T.float() @ features.float()
    return bool((found.float() - expected).norm() <= ROUNDING * max(_rounding(output), 1e-7) * expected.norm())


@torch.no_grad()
def _affine_map(layer: nn.Module, features: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the weight ``(C, D)`` and bias ``(C,)`` of a layer, from its outputs for zero and for the unit vectors."""
    width = features.shape[1]
    unit = torch.eye(width, dtype=features.dtype, device=features.device)
    try:
        bias = layer(torch.zeros_like(unit[:1]))
        outputs = layer(unit)
    except (RuntimeError, TypeError, ValueError):
        return None
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        return None
    return (outputs - bias).T.contiguous(), bias[0]


@torch.no_grad()
def _reproduces(weight: Tensor, bias: Tensor | None, call: LayerCall) -> bool:
    """Return whether a weight and a bias reproduce the call's output, up to rounding."""
    assert call.features is not None and call.output is not None
    features, output = call.features[:CHECKED_ROWS], call.output[:CHECKED_ROWS]
    if weight.shape != (output.shape[1], features.shape[1]):
        return False
    made = _product(features, weight, bias)
    size = _product(features.abs(), weight.abs(), None if bias is None else bias.abs())
    known = made.isfinite() & output.isfinite()
    error = (made - output.to(made.dtype)).abs()
    return bool((error <= ROUNDING * _rounding(output) * size + 1e-30)[known].all())


def _rounding(output: Tensor) -> float:
    """Return the relative rounding error of a matrix product."""
    if output.is_cuda and output.dtype == torch.float32:
        return 1e-3  # TF32
    return torch.finfo(output.dtype).eps if output.dtype.is_floating_point else 1.0


def _whole(parameter: Tensor) -> Tensor:
    """Return a parameter, gathered from all processes if they share it (a ``DTensor``)."""
    gather = getattr(parameter, "full_tensor", None)
    return parameter if gather is None else gather().detach()  # type: ignore[no-any-return]


def _product(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.float32 if features.device.type == "mps" else torch.float64
    shift = None if bias is None else bias.to(wide)
    return nn.functional.linear(features.to(wide), weight.to(wide), shift)


@contextmanager
def returning_logits(model: nn.Module, head: str | None, logits: Callable[[Any], Tensor]) -> Iterator[None]:
    """Make the model return its logits ``(N, C)`` inside the block in place of its usual output.

    Args:
        model: The model.
        head: The name of the layer whose output is the logits, or ``None``.
        logits: Returns the logits from the model's output; used if ``head`` is ``None``.
    """
    outputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Tensor) -> None:
        outputs.append(as_rows(output).clone())

    def replace(module: nn.Module, arguments: Any, output: Any) -> Tensor:
        made = torch.cat(outputs) if outputs else as_rows(logits(output))
        outputs.clear()
        return made

    with ExitStack() as stack:
        if head is not None:
            stack.callback(named_layer(model, head).register_forward_hook(keep).remove)
        stack.callback(model.register_forward_hook(replace).remove)
        yield
