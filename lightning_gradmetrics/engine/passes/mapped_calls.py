"""Calls that are mapped over the samples, with a copy of the parameters for each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.tracing.axes import Axis
from lightning_gradmetrics.engine.tracing.calls import map_arguments

__all__ = ["mapped_call"]


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
