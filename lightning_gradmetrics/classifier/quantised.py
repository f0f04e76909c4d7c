"""Refuses parameters without a gradient: complex and integer parameters, those of new lazy modules, and those before a quantised layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_gradmetrics.classifier.forward import Inputs, call, tensors_in
from lightning_gradmetrics.classifier.mutable_parts import module_of

__all__ = ["check_differentiable", "check_types", "refuse_uninitialised"]

QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")
"""Modules that define torch's quantised layers, whose outputs have no gradient."""


def check_types(parameters: Mapping[str, nn.Parameter], norms_only: bool = False) -> None:
    """Refuse parameters whose gradient does not exist, or for which the statistics are undefined.

    Args:
        parameters: The chosen parameters by name.
        norms_only: Whether only norms are computed, which complex gradients have too.

    Raises:
        ValueError: If the parameters have no values, or one is of an integer type, was made in inference mode, or is complex and more
            than norms are computed.
    """
    if next(iter(parameters.values())).is_meta:
        raise ValueError("the parameters are on the meta device and have no values: load or initialise the model first")
    for name, parameter in parameters.items():
        if parameter.is_inference():
            raise ValueError(
                f"the parameter {name!r} was made in torch.inference_mode(), so it can have no gradient: create or load the model "
                "outside of it"
            )
        if parameter.is_floating_point() or (parameter.is_complex() and norms_only):
            continue
        why = "does not exist"
        if parameter.is_complex():
            why = "has no largest entry and no sign: only norms such as l1 and l2 are defined"
        raise ValueError(
            f"the parameter {name!r} is {parameter.dtype}, and its gradient {why}; choose floating-point parameters "
            f"only, as in parameters=lambda name: name != {name!r} or by the target of a score"
        )


def refuse_uninitialised(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters of lazy modules that have no values before the first forward pass.

    Raises:
        ValueError: If there is such a parameter.
    """
    for name, parameter in parameters.items():
        if is_lazy(parameter):
            raise ValueError(
                f"the parameter {name!r} of a lazy module has no values yet: call the model once on a batch, so that it creates them"
            )


def check_differentiable(
    model: nn.Module, inputs: Inputs, parameters: Iterable[nn.Parameter], modules: Iterable[nn.Module]
) -> None:
    """Refuse parameters whose gradient would pass through a quantised layer. Only models with such layers are run.

    Args:
        model: The model, within :func:`lightning_gradmetrics.classifier.forward.preserved`.
        inputs: Its inputs.
        parameters: The chosen parameters.
        modules: The model's modules.

    Raises:
        ValueError: If a quantised layer's input depends on a chosen parameter.
    """
    kinds = tuple(kind for kind in set(map(type, modules)) if module_of(kind).startswith(QUANTISED))
    if not kinds:
        return
    layers: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if type(module) in kinds:
            layers.append((name, module))
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    with ExitStack() as stack:
        for name, layer in layers:
            hook = layer.register_forward_pre_hook(partial(_refuse, name), with_kwargs=True)
            stack.callback(hook.remove)
        call(model, inputs)


def _refuse(name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
    if any(tensor.requires_grad for tensor in tensors_in((args, kwargs))):
        raise ValueError(
            f"the quantised layer {name!r} ({type(layer).__name__}) has no gradient, and chosen parameters come before it: "
            "choose parameters after it only, or score the model before it is quantised"
        )
