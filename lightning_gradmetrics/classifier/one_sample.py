"""Works around wrong gradients of torch's batch norm in eval mode for batches of one sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["contiguous_batch_norm_gradients"]


class _ContiguousGradients(TorchFunctionMode):
    """Makes the gradient that enters a batch norm contiguous.

    For one sample, torch mistakes a transposed gradient for a contiguous one and reads its entries in the wrong order.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "batch_norm" and isinstance(result, Tensor):
            with torch._C.DisableTorchFunction():  # not a hook of the model
                if result.requires_grad:
                    result.register_hook(_contiguous)  # type: ignore[no-untyped-call]
        return result


def _contiguous(gradient: Tensor) -> Tensor:
    return gradient.clone(memory_format=torch.contiguous_format)


@contextmanager
def contiguous_batch_norm_gradients(size: int) -> Iterator[None]:
    """Make the gradients of batch norms correct for a batch of one sample, inside the block.

    Args:
        size: The number of samples; does nothing for more than one.
    """
    if size != 1:
        yield
        return
    with _ContiguousGradients():
        yield
