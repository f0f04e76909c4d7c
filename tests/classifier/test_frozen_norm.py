"""Batch norm as an affine map: its gradients are those of torch, and it is used only where that holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gradmetrics.classifier import frozen_norm
from lightning_gradmetrics.classifier.frozen_norm import EarlyProduct, frozen_batch_norms


class Norm(nn.Module):
    """A batch norm with random statistics, called by a function."""

    def __init__(self, run: Callable[[Norm, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.run = nn.BatchNorm1d(5).double().eval(), run
        for values in (self.norm.weight, self.norm.running_var):
            nn.init.uniform_(values, 0.5, 2)
        nn.init.normal_(self.norm.running_mean)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x).tanh()


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
    return out, gradient


def _dynamic(model: Norm, x: Tensor) -> Tensor:
    """The weight depends on the input."""
    return F.batch_norm(x, model.norm.running_mean, model.norm.running_var, x.mean((0, 2)), None, False)


def _train(model: Norm, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, model.norm.weight, training=True)


def _in_transform(model: Norm, x: Tensor) -> Tensor:
    return torch.func.vmap(lambda sample: model.norm(sample[None])[0])(x)


def _without_parameters(model: Norm, x: Tensor) -> Tensor:
    return F.batch_norm(input=x, running_mean=model.norm.running_mean, running_var=model.norm.running_var, eps=0.5)


CASES = {
    "module": (lambda model, x: model.norm(x), True),
    "in place": (lambda model, x: F.relu(model.norm(x), inplace=True), True),
    "without parameters": (_without_parameters, True),
    "weight from the input": (_dynamic, False),
    "train": (_train, False),
    "inside vmap": (_in_transform, False),
}


@pytest.mark.parametrize(("run", "frozen"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("size", [1, 4])
def test_values_and_gradients_are_those_of_torch(
    run: Callable[[Norm, Tensor], Tensor], frozen: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, calls = Norm(run), torch.randn(size, 5, 3, dtype=torch.float64), []
    expected, expected_gradient = gradients(model, x)
    run_frozen = frozen_norm.frozen_batch_norm
    monkeypatch.setattr(frozen_norm, "frozen_batch_norm", lambda *given: calls.append(given) or run_frozen(*given))
    with frozen_batch_norms(model, 2):
        out, gradient = gradients(model, x)
    assert bool(calls) == frozen
    assert torch.equal(out, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-14)


def test_parameters_that_require_gradients_get_them() -> None:
    model, x = Norm(lambda model, x: model.norm(x)).requires_grad_(), torch.randn(4, 5, 3, dtype=torch.float64)
    with frozen_batch_norms(model, 2):
        model(x.requires_grad_()).sum().backward()
    assert model.norm.weight.grad is not None and model.norm.bias.grad is not None


def test_compiled_models_run_without_the_mode() -> None:
    model = Norm(lambda model, x: model.norm(x))
    model.compile(backend="eager")
    with frozen_batch_norms(model, 2):
        assert not torch.overrides._get_current_function_mode_stack()


def _doubled(gradient: Tensor) -> None:
    gradient.mul_(2)


@pytest.mark.parametrize("hook", [lambda g: 2 * g, _doubled, None])
def test_a_product_is_used_only_for_the_gradient_of_which_it_was_computed(hook: Callable[[Tensor], Tensor]) -> None:
    x, early = torch.randn(2, 3, 4, requires_grad=True), EarlyProduct()
    mean, variance = torch.zeros(3), torch.ones(3)
    out = frozen_norm.frozen_batch_norm(x, None, None, mean, variance, 0.0, False, early)
    out.register_hook(lambda g: early.set(g, torch.full_like(g, 7)))
    if hook is not None:
        out.register_hook(hook)
    (1 * out).backward(torch.ones(2, 3, 4))
    assert x.grad is not None and early.is_late == (hook is not None)
    torch.testing.assert_close(x.grad, torch.full_like(x, 7 if hook is None else 2))
