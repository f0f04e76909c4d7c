"""Tensors that a forward pass without gradients made from parameters and kept do not hide these parameters' gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradmetrics.engine import gradient_statistics
from tests.engine.kinds import CLASSES, WIDTH, error_of, numbers


class _Caching(nn.Module):
    """Computes a weight from parameters once, beside a constant that it needs."""

    def __init__(self, keep: Any) -> None:
        super().__init__()
        self.a, self.head, self.keep = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES), keep
        self.factor, self.memo, self.kept, self.features = torch.tensor(2.0), {}, None, None
        self.register_buffer("view", None)

    def forward(self, x: Tensor) -> Tensor:
        self.size = len(x)
        self.features = torch.tanh(x @ self.keep(self) * self.factor)
        return self.head(self.features)


def _attribute(net: Any) -> Tensor:
    if not hasattr(net, "weight"):
        net.weight = net.a.weight.softmax(0)
    return net.weight


def _set_to_none(net: Any) -> Tensor:
    if net.kept is None:
        net.kept = (net.a.weight.t(), 3)
    return net.kept[0]


def _buffer(net: Any) -> Tensor:
    if net.view is None:
        net.view = net.a.weight[:]
    return net.view


def _memo(net: Any) -> Tensor:
    net.memo.setdefault("scale", torch.ones(WIDTH).double())
    net.memo.setdefault(f"weight {net.size}", net.a.weight * 2)
    return net.memo[f"weight {net.size}"]


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("keep", [_attribute, _set_to_none, _buffer, _memo])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_pass_through_a_cached_tensor(keep, context, engine):
    torch.manual_seed(0)
    model = _Caching(keep).double().eval()
    model.factor = model.factor.double()
    with context():
        for size in (3, 5):
            model(numbers(size, WIDTH))
    kept = {name: value for name, value in vars(model).items() if isinstance(value, (Tensor, tuple))}
    for size in (3, 5, 4):
        x = numbers(size, WIDTH)
        found = gradient_statistics(model, x, "pseudo_label", per_parameter=True, engine=engine).norm(2)
        fresh = _Caching(keep).double().eval()
        fresh.load_state_dict(model.state_dict(), strict=False)
        fresh.factor = model.factor
        for number in range(size):
            logits = fresh(x[number : number + 1])
            gradients = torch.autograd.grad(
                F.cross_entropy(logits, logits.argmax(1)), list(fresh.parameters()), allow_unused=True
            )
            fresh.__dict__.pop("weight", None)
            fresh.memo, fresh.kept, fresh.view = {}, None, None
            expected = [torch.zeros(()).double() if gradient is None else gradient.norm() for gradient in gradients]
            torch.testing.assert_close(found[number], torch.stack(expected))
    assert all(vars(model)[name] is value for name, value in kept.items())


def test_a_tensor_from_earlier_weights_is_a_constant():
    """The model's logits depend on the kept tensor, which it would compute otherwise now."""
    torch.manual_seed(0)
    model, x = _Caching(_attribute).double().eval(), numbers(4, WIDTH)
    model.factor = model.factor.double()
    with torch.no_grad():
        model(x)
        for changed in (False, True):
            if changed:
                model.a.weight.mul_(2)
            found = gradient_statistics(model, x, "pseudo_label", lambda name: name == "a.weight").norm(2)
            assert bool((found == 0).all()) == changed


def test_a_state_that_changes_the_logits_is_kept():
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head, self.state = (
                nn.Linear(WIDTH, WIDTH),
                nn.Linear(WIDTH, CLASSES),
                torch.zeros(WIDTH).double(),
            )

        def forward(self, x: Tensor) -> Tensor:
            state, self.state = self.state, self.a.bias.tanh() + self.state * 0.5
            return self.head(torch.tanh(self.a(x) + state))

    torch.manual_seed(0)
    model = Stateful().double().eval()
    with torch.no_grad():
        model(numbers(3, WIDTH))
    assert error_of(model, numbers(4, WIDTH)) < 1e-8


def test_an_attribute_that_every_forward_pass_overwrites_is_left_alone():
    """Only a model with a cache runs more often: after the first call none of its attributes is examined again."""
    torch.manual_seed(0)
    model, runs = _Caching(lambda net: net.a.weight.t()).double().eval(), []
    model.factor = model.factor.double()
    model.register_forward_hook(lambda *_: runs.append(1))
    for calls in (None, 1, 1):
        with torch.no_grad():
            model(numbers(3, WIDTH))
        runs.clear()
        gradient_statistics(model, numbers(3, WIDTH), "pseudo_label")
        assert calls is None or len(runs) == calls
