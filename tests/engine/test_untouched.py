"""The model is unchanged after every outcome."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_gradmetrics.engine import gradient_statistics
from tests.engine.cases import made


def _snapshot(model: nn.Module):
    values = {name: (value.clone(), value._version) for name, value in model.state_dict(keep_vars=True).items()}
    grads = [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()]
    parameters = [(id(p), p.requires_grad, g) for p, g in zip(model.parameters(), grads, strict=True)]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    tensor_hooks = [p._backward_hooks for p in model.parameters()]
    return values, parameters, hooks, tensor_hooks, [m.training for m in model.modules()], torch.random.get_rng_state()


def _same(before, after) -> None:
    for name, (value, version) in before[0].items():
        assert torch.equal(value, after[0][name][0]) and version == after[0][name][1], name
    for (i, r, g), (j, s, h) in zip(before[1], after[1], strict=True):
        assert (i, r) == (j, s) and (g is None) == (h is None)
        assert g is None or (g[0] == h[0] and torch.equal(g[1], h[1]))
    assert before[2:5] == after[2:5]
    assert torch.equal(before[5], after[5])


class Boom(Exception):
    pass


@pytest.mark.parametrize("engine", ["auto", "vmap", "reference"])
@pytest.mark.parametrize("where", ["nowhere", "objective", "forward"])
def test_untouched(engine, where):
    model, x = made("convolutional")
    model[0].bias.requires_grad_(False)
    model(x).sum().backward()
    model[-1].train()
    if engine == "auto":
        gradient_statistics(model, x, "uniform")
    calls = 0

    def explode(*_):
        nonlocal calls
        calls += 1
        if calls == 1 and where != "nowhere":
            raise Boom("here")

    handle = model[4].register_forward_hook(explode) if where == "forward" else None

    def objective(logits):
        if where == "objective":
            raise Boom("here")
        return logits.square().sum(1)

    before = _snapshot(model)
    if where == "nowhere":
        gradient_statistics(model, x, objective, engine=engine)
    else:
        with pytest.raises(Boom, match="here"):
            gradient_statistics(model, x, objective, engine=engine)
    _same(before, _snapshot(model))
    assert handle is None or calls == 1


def test_a_users_error_in_the_first_call_is_raised_unchanged():
    model, x = made("linear")

    def wrong(logits):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        gradient_statistics(model, x, wrong)


class _Alternating(nn.Module):
    """Changes the sign of an attribute in place before it multiplies by an entry of it."""

    def __init__(self):
        super().__init__()
        self.layer, self.sign = nn.Linear(5, 3), torch.ones(2, 2, dtype=torch.float64)

    def forward(self, x):
        self.sign.mul_(-1)
        return self.layer(x) * self.sign[0, 0]


@pytest.mark.filterwarnings("ignore:no fast rule")
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_an_attribute_that_is_changed_in_place_keeps_its_value_for_the_backward_pass(engine):
    torch.manual_seed(0)
    model, x = _Alternating().double(), torch.randn(1, 5).double()
    with torch.no_grad():
        expected = model.layer(x).neg().softmax(1)
    gradient = torch.cat([expected, expected * x.norm()], 1)
    gradient[0, expected.argmax()] -= 1
    gradient[0, 3 + expected.argmax()] -= x.norm()
    found = gradient_statistics(model, x, "pseudo_label", engine=engine).norm(2)
    torch.testing.assert_close(found, gradient.norm()[None])


class _Registering(nn.Module):
    """Registers a submodule, or a parameter, in its first forward pass."""

    def __init__(self, name: str, make) -> None:
        super().__init__()
        self.body, self.name, self.make = nn.Linear(4, 3), name, make

    def forward(self, x):
        logits = self.body(x)
        if not hasattr(self, self.name):
            setattr(self, self.name, self.make())
        added = getattr(self, self.name)
        return logits * added if isinstance(added, torch.Tensor) else added(logits)


@pytest.mark.parametrize("engine", ["auto", "vmap", "reference"])
def test_what_a_forward_pass_registers_is_removed_and_new_parameters_are_refused(engine):
    x = torch.randn(5, 4)
    model = _Registering("act", nn.Tanh).eval()
    twin = nn.Sequential(model.body, nn.Tanh()).eval()
    for _ in range(3):
        found = gradient_statistics(model, x, "pseudo_label", engine=engine)
        torch.testing.assert_close(found.norm(), gradient_statistics(twin, x, "pseudo_label").norm())
        assert list(model._modules) == ["body"]
    parameters = {"head": lambda: nn.Linear(3, 3), "scale": lambda: nn.Parameter(torch.full((3,), 2.0))}
    for name, make in parameters.items():
        model = _Registering(name, make).eval()
        with pytest.raises(ValueError, match=name):
            gradient_statistics(model, x, "pseudo_label", engine=engine)
        assert [n for n, _ in model.named_parameters()] == ["body.weight", "body.bias"]
        gradient_statistics(model, x, "pseudo_label", lambda n: n.startswith("body"), engine=engine)
        model(x)
        assert len(gradient_statistics(model, x, "pseudo_label", engine=engine).names) > 2


class _ChangesGradients(nn.Module):
    """Zeroes, converts or adds to the gradients of its parameters in its forward pass."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.body, self.head, self.way = nn.Linear(4, 4), nn.Linear(4, 3), way

    def forward(self, x):
        if self.way == "zeroes":
            self.zero_grad(set_to_none=False)
        elif self.way == "converts":
            self.to(torch.bfloat16).to(x.dtype)
        elif torch.is_grad_enabled() and self.body.weight.requires_grad:
            self.body.weight.square().sum().backward()
        return self.head(self.body(x).tanh())


@pytest.mark.filterwarnings("ignore:no fast rule")
@pytest.mark.parametrize("way", ["zeroes", "converts", "adds"])
def test_gradients_of_the_user_that_a_forward_pass_changes_come_back(way):
    model, x = _ChangesGradients(way).eval(), torch.randn(5, 4)
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    before = _snapshot(model)
    for _ in range(2):
        gradient_statistics(model, x, "pseudo_label")
        _same(({}, *before[1:]), _snapshot(model))


class _Caching(nn.Module):
    """Keeps a tensor between two other attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table, self.last, self.layer = 1, torch.ones(4), 2, nn.Linear(4, 3)

    def forward(self, x):
        if not hasattr(self, "table"):
            self.table = torch.ones(4)
        return self.layer(x * self.table)


def test_attributes_keep_their_order():
    model = _Caching().eval()
    before = list(vars(model))
    gradient_statistics(model, torch.randn(5, 4), "pseudo_label")
    assert list(vars(model)) == before
