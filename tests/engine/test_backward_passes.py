"""Models whose backward pass is their own, by gradients in the forward pass, functions or hooks: each engine is exact, or says why not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_gradmetrics.engine import gradient_statistics


class _OwnGradient(nn.Module):
    """Classifies the gradient of an energy with respect to the input."""

    def __init__(self):
        super().__init__()
        self.energy, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.energy(x).tanh().sum(), x, create_graph=True)
        return self.head(gradient)


@pytest.mark.filterwarnings("ignore:no fast rule")
def test_forward_passes_that_need_gradients_run_with_the_reference_engine():
    model, x = _OwnGradient().double(), torch.randn(3, 4).double()
    found = [gradient_statistics(model, x, "uniform", engine=engine).norm() for engine in ("auto", "reference")]
    torch.testing.assert_close(*found)


class _OfNeeds(torch.autograd.Function):
    """A product whose gradient of the first factor is doubled if the second one needs a gradient too."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient * weight * (2 if ctx.needs_input_grad[1] else 1), (gradient * x).sum(0)


class _Needing(nn.Module):
    """Applies such a product between two layers."""

    def __init__(self):
        super().__init__()
        self.body, self.weight, self.head = nn.Linear(4, 4), nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(_OfNeeds.apply(self.body(x).tanh(), self.weight))


@pytest.mark.filterwarnings("ignore:no fast rule")
def test_functions_see_that_all_chosen_parameters_need_gradients():
    torch.manual_seed(0)
    model, x = _Needing().double(), torch.randn(5, 4).double()
    found = [gradient_statistics(model, x, "uniform", engine=engine).norm() for engine in ("auto", "reference")]
    torch.testing.assert_close(*found)


class _Normalising(nn.Module):
    """Normalises the gradient of a layer's output by a hook: its backward pass is not linear."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.body(x).tanh()
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient / gradient.norm())
        return self.head(hidden)


@pytest.mark.filterwarnings("ignore:no fast rule")
def test_torch_func_gets_losses_of_their_own_scale_or_refuses():
    torch.manual_seed(0)
    model, x = _Normalising().double(), torch.randn(5, 4).double()
    found = [gradient_statistics(model, x, "uniform", engine=engine).norm() for engine in ("vmap", "reference")]
    torch.testing.assert_close(*found)
    with pytest.raises(NotImplementedError, match="engine='vmap' needs: use engine='auto'"):
        gradient_statistics(_Needing().double(), x, "uniform", engine="vmap")


class _InPlace(nn.Module):
    """Adds the samples to a constant in place, which torch.func cannot map over the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        padded = torch.zeros(len(x), 4)
        padded[:, 1:] += x[:, 1:]
        return self.head(padded)


def test_errors_of_operations_under_torch_func_say_what_to_do() -> None:
    with pytest.raises(NotImplementedError, match=r"torch\.func cannot run _InPlace.*use engine='auto'.*doesn't match"):
        gradient_statistics(_InPlace(), torch.randn(5, 4), "uniform", engine="vmap")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        gradient_statistics(nn.Linear(3, 3), torch.randn(5, 4), "uniform", engine="vmap")


def test_hooks_of_parameters_are_refused_by_torch_func_which_does_not_call_them() -> None:
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    model.weight.register_hook(torch.zeros_like)
    with pytest.raises(NotImplementedError, match=r"weight has a hook, which torch\.func does not call"):
        gradient_statistics(model, x, "uniform", engine="vmap")
