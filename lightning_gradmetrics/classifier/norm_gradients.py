"""Works around wrong gradients of torch's batch norms of one sample and of instance norms, which are batch norms of one row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

__all__ = ["exact_norm_gradients", "exact_norm_gradients_in", "is_instance_norm"]


class _ExactGradients(TorchFunctionMode):
    """Repairs the memory layouts with which torch computes wrong gradients.

    In a batch norm of one row, torch mistakes a transposed tensor for a contiguous one, and combines entries of the input and
    the gradient that do not belong together.

    Args:
        repairs_batch_norms: Whether batch norms have one row.
    """

    def __init__(self, repairs_batch_norms: bool) -> None:
        super().__init__()
        self._repairs_batch_norms = repairs_batch_norms

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if is_instance_norm(func):
            _repair(result, None)
        elif self._repairs_batch_norms and getattr(func, "__name__", "") == "batch_norm":
            _repair(result, args[0] if args else kwargs["input"])
        return result


def is_instance_norm(function: Any) -> bool:
    """Return whether a function is one of torch's instance norms."""
    return getattr(function, "__name__", "") == "instance_norm"


def _repair(result: Any, x: Tensor | None) -> None:
    """Change the layout of a norm's output gradient to one that torch does not mistake for another.

    Args:
        result: The output.
        x: The input; ``None`` if torch makes it contiguous.
    """
    if not isinstance(result, Tensor):
        return
    with torch._C.DisableTorchFunction():  # not a hook of the model
        if result.requires_grad:
            repaired = _contiguous if x is None or x.is_contiguous() else _channels_last
            result.register_hook(repaired)  # type: ignore[no-untyped-call]


def _contiguous(gradient: Tensor) -> Tensor:
    return gradient.clone(memory_format=torch.contiguous_format)


def _channels_last(gradient: Tensor) -> Tensor:
    """Return a gradient in the channels-last layout, with which torch is right whatever the layout of the input is."""
    layout = _LAYOUTS.get(gradient.ndim)
    return gradient if layout is None else gradient.clone(memory_format=layout)


_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The channels-last layout by the number of axes; torch is right for fewer axes."""


@contextmanager
def exact_norm_gradients(size: int) -> Iterator[None]:
    """Make the gradients of instance norms correct inside the block, and those of batch norms in a batch of one sample.

    Args:
        size: The number of samples.
    """
    with _ExactGradients(size == 1):
        yield


@contextmanager
def exact_norm_gradients_in(nodes: Iterable[Node]) -> Iterator[None]:
    """Make the gradients of these norms correct inside the block.

    Args:
        nodes: The nodes of a graph.
    """
    hooks = []
    for node in nodes:
        if node.name() == "NativeBatchNormBackward0":
            hooks.append(node.register_prehook(_of_one_row))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _of_one_row(gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    first, *others = gradients
    if first is not None and len(first) == 1:
        first = _channels_last(first)
    return first, *others
