"""Batch norm with running statistics as an affine map of its input, so that its backward pass is one product.

The backward pass of torch's batch norm also sums over all positions in eval mode, which takes several times longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from lightning_gradmetrics.classifier.forward import has_compiled_parts
from lightning_gradmetrics.classifier.norm_gradients import exact_norm_gradients

__all__ = ["EarlyProduct", "frozen_batch_norm", "frozen_batch_norms"]


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, *rest: Any) -> Tensor:
        bias, mean, variance, eps, cudnn, early = rest
        # With room for a product, the factor is computed only if a backward pass finds none.
        if early is None:
            ctx.save_for_backward(_factor(weight, variance, eps))
        else:
            ctx.save_for_backward(weight, variance)
        ctx.early, ctx.eps = early, eps
        return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, cudnn)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        product = None if ctx.early is None else ctx.early.taken(gradient)
        if product is not None:
            return product, *[None] * 7
        if ctx.early is None:
            (factor,) = ctx.saved_tensors
        else:
            weight, variance = ctx.saved_tensors
            factor = _factor(weight, variance, ctx.eps)
        product = gradient * factor.view(1, -1, *[1] * (gradient.ndim - 2))
        return product if product.dtype == gradient.dtype else product.to(gradient.dtype), *[None] * 7


def _factor(weight: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    """Return the factors of the output's gradient in that of the input, ``(C,)``, rounded once, as the compiled kernel does."""
    root = ((variance.double() if variance.is_cpu else variance) + eps).sqrt()
    return (root.reciprocal() if weight is None else weight / root).to(variance.dtype)


@dataclass
class EarlyProduct:
    """The gradient of a frozen batch norm's input, computed by a hook of its output in the same pass as other sums.

    Args:
        is_late: Whether the backward pass ran without a product, so that a hook would compute it for nothing.
    """

    is_late: bool = False
    _product: tuple[Tensor, int, Tensor] | None = None

    def set(self, gradient: Tensor, product: Tensor) -> None:
        """Store the product of a gradient."""
        self._product = gradient, gradient._version, product

    def taken(self, gradient: Tensor) -> Tensor | None:
        """Return the product of this gradient, once; ``None`` if it was not computed, or is that of another gradient."""
        stored, self._product = self._product, None
        if stored is not None and stored[0] is gradient and gradient._version == stored[1]:
            return stored[2]
        self.is_late = True
        return None


def frozen_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    cudnn: bool,
    early: EarlyProduct | None = None,
) -> Tensor:
    """Return ``torch.batch_norm`` with running statistics, differentiable with respect to its input only.

    Args:
        x: ``(N, C, ...)``.
        weight: ``(C,)``.
        bias: ``(C,)``.
        mean: ``(C,)``, the running mean.
        variance: ``(C,)``, the running variance.
        eps: Added to the variance.
        cudnn: Whether the forward pass may use cuDNN.
        early: Room for the gradient of the input, which a hook of the output may compute.

    Example:
        >>> x = torch.ones(2, 3, requires_grad=True)
        >>> frozen_batch_norm(x, None, None, torch.zeros(3), torch.full((3,), 4.0), 0.0, False).sum().backward()
        >>> x.grad[0]
        tensor([0.5000, 0.5000, 0.5000])
    """
    return _Frozen.apply(x, weight, bias, mean, variance, eps, cudnn, early)  # type: ignore[no-untyped-call, no-any-return]


class _FrozenNorms(TorchFunctionMode):
    """Calls :func:`frozen_batch_norm` where only the input of a batch norm requires a gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm and _has_constant_parameters(*args, **(kwargs or {})):
            return _frozen(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _frozen(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return a frozen batch norm, with the arguments of :func:`torch.nn.functional.batch_norm`."""
    return frozen_batch_norm(input, weight, bias, running_mean, running_var, eps, torch.backends.cudnn.enabled)


def _has_constant_parameters(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> bool:
    """Return whether a batch norm uses running statistics and constants, outside transforms of ``torch.func``."""
    if training or running_mean is None or running_var is None or type(input) is not Tensor:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    parameters = [value for value in (running_mean, running_var, weight, bias) if value is not None]
    return not any(parameter.requires_grad for parameter in parameters)


@contextmanager
def frozen_batch_norms(model: nn.Module, size: int) -> Iterator[None]:
    """Shorten the backward passes of batch norms in eval mode whose parameters require no gradient, inside the block.

    The gradients of other norms are correct for all strides.

    Args:
        model: The model that is called inside the block. Does nothing if ``torch.compile`` was applied to a part of it.
        size: The number of samples.
    """
    if has_compiled_parts(model):
        yield
        return
    with exact_norm_gradients(size), _FrozenNorms():
        yield
