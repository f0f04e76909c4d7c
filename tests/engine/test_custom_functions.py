"""Custom autograd functions: which backward passes are proven to keep samples apart, and which are compared or refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gradmetrics.engine import auto, gradient_statistics
from lightning_gradmetrics.engine.refusals import REFUSALS, CoupledSamplesError
from tests.engine.kinds import WIDTH, Net, error_of, numbers

STATE = SimpleNamespace(factor=2.0, calls=0)


def function_of(backward: Callable[..., Tensor], prepare: Callable[..., Any] = lambda ctx, x: None) -> Any:
    """Return a custom function that stores its argument and its result.

    Args:
        backward: Gets the context, the gradient, the argument and the result.
        prepare: Gets the context and the argument in the forward pass.
    """

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            result = x * x.sigmoid()
            ctx.save_for_backward(x, result)
            ctx.factor, ctx.size = STATE.factor, len(x)
            prepare(ctx, x)
            return result

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return backward(ctx, gradient, *ctx.saved_tensors)

    return Custom


class WithContext(torch.autograd.Function):
    """A function whose context is set up separately."""

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.factor / (1 + (ctx.factor * x).pow_(2)) * gradient, None


def model_with(function: Any, *arguments: Any) -> nn.Module:
    torch.manual_seed(0)

    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head(torch.tanh(net.b(function.apply(net.a(x), *arguments))))

    return Net(forward).double().eval()


def is_proven(model: nn.Module) -> bool:
    """Return whether a proof covers the batches so far."""
    strategies = [strategy for known in auto._STRATEGIES.get(model, {}).values() for strategy in known]
    return bool(strategies) and all(strategy.sizes is not None for strategy in strategies)


def written(ctx: Any, g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    gradient = g.clone()
    gradient *= y
    gradient -= (gradient * y).sum(-1, keepdim=True) * x
    return gradient


def swish(ctx: Any, g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return g * (gate * (1 + x * (1 - gate)))


PROVEN: dict[str, Any] = {
    "a formula": swish,
    "the stored result": lambda ctx, g, x, y: g * y,
    "an attribute": lambda ctx, g, x, y: ctx.factor * g,
    "written in place": written,
    "a mask": lambda ctx, g, x, y: g.masked_fill(x > 0, 0),
    "a choice": lambda ctx, g, x, y: torch.where(x > 0, g * y, -g),
    "a copy if the memory is not contiguous": lambda ctx, g, x, y: g.t().contiguous().t() * y,
}


@pytest.mark.parametrize("name", PROVEN)
def test_a_proof_covers_functions_that_keep_samples_apart(name: str) -> None:
    model = model_with(function_of(PROVEN[name]))
    for size in (5, 5, 9):
        assert error_of(model, numbers(size, WIDTH)) < 1e-8, size
    assert is_proven(model)


def test_a_proof_covers_new_lengths() -> None:
    torch.manual_seed(0)
    function = function_of(written)
    model = Net(lambda net, x: net.head(torch.tanh(function.apply(net.a(x))).mean(1))).double().eval()
    for length in (3, 3, 5, 4, 7):
        assert error_of(model, numbers(4, length, WIDTH)) < 1e-8, length
    assert is_proven(model)


def test_a_function_with_a_separate_context_is_proven() -> None:
    model = model_with(WithContext, 2.0)
    for size in (5, 5, 9):
        assert error_of(model, numbers(size, WIDTH)) < 1e-8
    assert is_proven(model)


def by_value(ctx: Any, g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return g * 0.5 if float(x.abs().max()) > 3 else g * y


def counted(ctx: Any, g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    STATE.calls += 1
    return g * STATE.calls


def by_nested_pass(ctx: Any, g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(x.tanh(), x, g)[0]


def written_to_another(ctx: Any, g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    memory = torch.zeros_like(x)
    view = memory.view(-1)
    torch.mul(g, y, out=memory)
    return g * view.view_as(g)


LARGEST = function_of(lambda ctx, g, x, y: g * ctx.largest, lambda ctx, x: setattr(ctx, "largest", x.max().detach()))
HOOKED = function_of(swish, lambda ctx, x: ctx.register_hook(lambda results, gradients: (results[0] * 2,)))

UNPROVEN: dict[str, Any] = {
    "centred": function_of(lambda ctx, g, x, y: g - g.mean(0)),
    "divided by the size": function_of(lambda ctx, g, x, y: g / len(g)),
    "divided by a stored size": function_of(lambda ctx, g, x, y: g / ctx.size),
    "divided by the norm": function_of(lambda ctx, g, x, y: g / g.norm()),
    "divided by the norm of each sample": function_of(lambda ctx, g, x, y: g / (1 + g.norm(dim=-1, keepdim=True))),
    "scaled by the largest value": function_of(lambda ctx, g, x, y: g * x.max()),
    "scaled by the largest value, stored": LARGEST,
    "samples in another order": function_of(lambda ctx, g, x, y: g.flip(0)),
    "clipped": function_of(lambda ctx, g, x, y: g.clamp(-1e-3, 1e-3)),
    "squared": function_of(lambda ctx, g, x, y: g * g.abs()),
    "squared through memory": function_of(written_to_another),
    "shifted": function_of(lambda ctx, g, x, y: g + 1e-3),
    "the memory of the gradient as integers": function_of(lambda ctx, g, x, y: g.view(torch.int64).view(g.dtype) * y),
    "a branch on a value": function_of(by_value),
    "computed by numpy": function_of(lambda ctx, g, x, y: torch.from_numpy(g.numpy() * 2.0)),
    "another backward pass": function_of(by_nested_pass),
    "a hook on the node": HOOKED,
    "random": function_of(lambda ctx, g, x, y: g * torch.rand_like(g)),
    "a counter": function_of(counted),
}
UNREPEATABLE = ("random", "a counter")


@pytest.mark.filterwarnings("ignore:no fast rule", "ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("name", UNPROVEN)
def test_other_functions_have_no_proof(name: str) -> None:
    model = model_with(UNPROVEN[name])
    with suppress(*REFUSALS):
        for size in (5, 5, 9):
            inputs = numbers(size, WIDTH)
            gradient_statistics(model, inputs, "pseudo_label")
            assert name in UNREPEATABLE or error_of(model, inputs) < 1e-8, size
            assert not is_proven(model)
    assert not is_proven(model)


def by_size(ctx: Any, g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return g * y if len(g) < 8 else g * x


def by_size_without_a_call(ctx: Any, g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    gradients = g * y, g * x
    return gradients[len(g) > 7]


class Passing(torch.autograd.Function):
    """Passes a gradient on to a tensor that it does not use."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient * 2, gradient * 3


def passing_another(net: Net, x: Tensor) -> Tensor:
    a, b = torch.tanh(net.a(x)), torch.tanh(net.b(x))
    other = a if len(x) < 8 else b
    return net.head(Passing.apply(a + b, other))


def of_size(backward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    function = function_of(backward)
    return lambda net, x: net.head(torch.tanh(function.apply(net.a(x))))


CHANGING: dict[str, Any] = {
    "another call in large batches": of_size(by_size),
    "another result in large batches": of_size(by_size_without_a_call),
    "another argument in large batches": passing_another,
}


@pytest.mark.filterwarnings("ignore:no fast rule")
@pytest.mark.parametrize("name", CHANGING)
def test_a_backward_pass_that_differs_from_the_proof_is_compared(name: str) -> None:
    torch.manual_seed(0)
    model = Net(CHANGING[name]).double().eval()
    for _ in range(3):
        assert error_of(model, numbers(5, WIDTH)) < 1e-8
    assert is_proven(model)
    with suppress(CoupledSamplesError):
        for _ in range(3):
            assert error_of(model, numbers(9, WIDTH)) < 1e-8


@pytest.mark.filterwarnings("ignore:no fast rule")
def test_one_sample_alone_shows_the_sizes_of_the_backward_pass_for_a_new_length() -> None:
    """For short inputs, the sum is complete for any number of samples; for longer ones it is not for one alone."""
    function = function_of(lambda ctx, g, x, y: g[:, : 4 * len(g)].sum(1, keepdim=True).expand_as(g))
    torch.manual_seed(0)
    model = Net(lambda net, x: net.head(torch.tanh(function.apply(net.a(x))).mean(1))).double().eval()
    for _ in range(2):
        assert error_of(model, numbers(5, 4, WIDTH)) < 1e-8
    assert is_proven(model)
    with suppress(CoupledSamplesError):
        for _ in range(2):
            assert error_of(model, numbers(5, 8, WIDTH)) < 1e-8


def test_an_attribute_that_changes_between_batches_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with(function_of(PROVEN["an attribute"]))
    for factor in (2.0, 2.0, 3.0, 2.0):
        monkeypatch.setattr(STATE, "factor", factor)
        assert error_of(model, numbers(5, WIDTH)) < 1e-8
