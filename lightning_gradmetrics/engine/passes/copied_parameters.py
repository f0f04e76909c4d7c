"""Calls with a copy of the parameters for each sample, which are broadcast or mapped over the samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.passes.plan import PlanError
from lightning_gradmetrics.engine.tracing.axes import Axis
from lightning_gradmetrics.engine.tracing.calls import map_arguments, tensors_in

__all__ = ["aligned_copies", "broadcast_arguments", "mapped_call"]


def broadcast_arguments(function: Callable[..., Any], args: Any, kwargs: Any, out: Axis) -> tuple[Any, Any, int]:
    """Return the arguments of a call in which a parameter may be replaced by its copies, and the number of axes of the result.

    Args:
        function: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        out: The sample axis of the result, on which copies are not repeated.
    """
    name = getattr(function, "__name__", "")
    ndim = max(map(Tensor.dim, tensors_in((args, kwargs))))
    if name in ("expand", "broadcast_to", "repeat", "tile"):
        sizes = args[1:] or tuple(kwargs.values())
        sizes = list(sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes)
        ndim = max(ndim, len(sizes))
        if name in ("repeat", "tile"):
            sizes[out.dim - ndim] = 1
            args, kwargs = (args[0], tuple(sizes)), {}
    return args, kwargs, ndim


def aligned_copies(copies: Tensor, axis: Axis, ndim: int) -> Tensor:
    """Return the copies of a parameter with the sample axis of a result.

    Args:
        copies: One copy per sample, ``(N, ...)``.
        axis: The sample axis of the result.
        ndim: The number of its axes.

    Raises:
        PlanError: If the parameter has entries along that axis.
    """
    size, *shape = copies.shape
    full = copies.reshape(size, *(1,) * (ndim - len(shape)), *shape)
    if full.shape[axis.dim + 1] != 1:
        raise PlanError("a parameter covers the sample axis")
    spread = full.unsqueeze(1).expand(size, axis.times, *full.shape[1:])
    rows = (spread.transpose(0, 1) if axis.minor else spread).flatten(0, 1)
    return rows.squeeze(axis.dim + 1).movedim(0, axis.dim)


def mapped_call(
    function: Callable[..., Any], args: Any, kwargs: Any, entries: Mapping[int, tuple[Tensor, int]], out: Axis
) -> Tensor:
    """Return the result of a function for each sample, joined along the sample axis.

    Args:
        function: The function of one sample.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        entries: By the identity of an argument, the tensor to map instead and its sample axis; other arguments are shared.
        out: The sample axis of the result.
    """
    order = {identity: number for number, identity in enumerate(entries)}
    tensors, dims = zip(*entries.values(), strict=True)

    def one(*values: Tensor) -> Tensor:
        def of_sample(tensor: Tensor) -> Tensor:
            return values[order[id(tensor)]] if id(tensor) in order else tensor

        new_args, new_kwargs = map_arguments(of_sample, (args, kwargs))
        return function(*new_args, **new_kwargs)  # type: ignore[no-any-return]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        mapped = torch.func.vmap(one, dims, out.dim + out.minor, randomness="same")(*tensors)
    return mapped.flatten(out.dim, out.dim + 1)
