"""Later batches repeat a known forward pass with less work per call, and notice every change of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_gradmetrics as lgm
from lightning_gradmetrics.engine.passes import path_record, strategy
from tests.engine.known_paths import CHANGED, batch, is_on, paths_of, require_equal


class Clipping(torch.autograd.Function):
    """Returns its input; its gradient is clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.clamp(-1e-3, 1e-3)


class Net(nn.Module):
    """A classifier with the usual layers; ``change`` alters the hidden activations while the state is on."""

    def __init__(self, change: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.body, self.norm = nn.Embedding(30, 6), nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.other, self.middle, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("near", torch.linspace(0.5, 1.5, 8))
        self.register_buffer("far", torch.linspace(2.0, 1.0, 8))
        self.change = change

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.norm(self.body(self.table(tokens).mean(1))).relu()
        h = self.change(self, h)
        return self.head(torch.tanh(self.middle(h)) + h)


def without_gradient(net: Net, h: Tensor) -> Tensor:
    if is_on():
        with torch.no_grad():
            return net.other(h) + h
    return net.other(h) + h


def hooked(net: Net, h: Tensor) -> Tensor:
    h = h * 2
    if is_on() and h.requires_grad:
        h.register_hook(lambda gradient: gradient * 3)
    return h


def caught(net: Net, h: Tensor) -> Tensor:
    try:
        return (h.sigmoid() if is_on() else h.tanh()) * h
    except Exception:
        return h.tanh() * h


def read(net: Net, h: Tensor) -> Tensor:
    return h * (1.5 if is_on() and h[0].sum().item() > -1e9 else 1.0)


def in_place(net: Net, h: Tensor) -> Tensor:
    first = h + 0.5
    if is_on():
        first.detach().mul_(2)
    return first - 0.5


def listed(net: Net, h: Tensor) -> Tensor:
    first, second = h.exp(), h.tanh()
    return torch.cat([second, first] if is_on() else [first, second], 1).view(-1, 2, 8).square().sum(1)


def one_less(net: Net, h: Tensor) -> Tensor:
    parts = [h.exp(), h.tanh(), h.sigmoid()]
    return torch.stack(parts[: 2 if is_on() else 3]).sum(0)


def halves(net: Net, h: Tensor) -> Tensor:
    first, second = h.exp().chunk(2, 1)
    return torch.cat((second, second if is_on() else first), 1)


def filled(net: Net, h: Tensor) -> Tensor:
    mask = h.new_ones(8)
    mask[3:5] = 3.0 if is_on() else 2.0
    return h * mask


def checkpointed(net: Net, h: Tensor) -> Tensor:
    return checkpoint(net.other, h, use_reentrant=False) if is_on() else net.other(h)


CHANGES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "a constant": lambda net, h: h * (2.0 if is_on() else 1.0),
    "the sign of zero": lambda net, h: h + torch.copysign(h, -0.0 if is_on() else 0.0),
    "a list": lambda net, h: F.pad(h, CHANGED.setdefault("pad", [0, 0]))[:, :8],
    "a buffer": lambda net, h: h * (net.far if is_on() else net.near),
    "a layer": lambda net, h: (net.middle if is_on() else net.other)(h),
    "a tensor": lambda net, h: torch.where(h > 0.5, h, h.neg() if is_on() else h.exp()),
    "which result": lambda net, h: torch.add(a := h.tanh(), h.sigmoid() if is_on() else a),
    "another function": lambda net, h: h.tanh() if is_on() else h.sigmoid(),
    "one more call": lambda net, h: h.exp() if is_on() else h,
    "one call less": lambda net, h: h if is_on() else h.exp(),
    "detached": lambda net, h: net.other(h.detach() if is_on() else h.clone()) + h,
    "a keyword": lambda net, h: torch.add(h, h, alpha=2) if is_on() else torch.add(h, h),
    "a custom function": lambda net, h: Clipping.apply(h) * 1 if is_on() else h * 1,
    "gradients off": without_gradient,
    "a hook": hooked,
    "an exception that the model catches": caught,
    "a value that Python reads": read,
    "an operation in place": in_place,
    "a checkpoint": checkpointed,
    "the order of a list": listed,
    "the length of a list": one_less,
    "one of two results": halves,
    "a value that is assigned": filled,
}


FAST = {("a constant", False), ("a buffer", False), ("the order of a list", True)}


@pytest.mark.parametrize(
    ("name", "is_large"),
    [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
        for case in itertools.product(CHANGES, [False, True])
    ],
)
@pytest.mark.filterwarnings("ignore:no fast rule")
def test_a_change_of_a_known_path_is_noticed(name: str, is_large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a path that releases results, as that of a large batch."""
    if is_large:
        monkeypatch.setattr(path_record, "MOST_BYTES", 0)
    torch.manual_seed(0)
    CHANGED.clear()
    CHANGED["on"] = False
    model = Net(CHANGES[name]).double().eval()
    for _ in range(4):
        require_equal(model, batch())
    assert [path.is_large for path in paths_of(model)] == [is_large]
    CHANGED["on"] = True
    CHANGED["pad"] = [0, 1]
    if name == "a list":
        CHANGED["pad"] = [1, 0]
    for _ in range(2):
        require_equal(model, batch())
    CHANGED["on"] = False
    require_equal(model, batch())


def test_a_constant_that_python_reads() -> None:
    """It is part of the path: a weight or a buffer may change between batches."""
    torch.manual_seed(0)
    model = Net(lambda net, h: h * 2 if bool((net.near > 0).all()) else h).double().eval()
    for _ in range(4):
        require_equal(model, batch())
    assert len(paths_of(model)) == 1
    for value in (0.0, 1.0):
        model.near.fill_(value)
        require_equal(model, batch())


@pytest.mark.parametrize("odd", [1, 5])
def test_a_path_is_known_again_after_an_odd_batch(odd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the batch before it has a known path or not; if all batches are odd, few are recorded."""
    torch.manual_seed(0)
    CHANGED.clear()
    model, recorded = Net(CHANGES["a constant"]).double().eval(), []
    recorder = strategy.PathRecorder
    monkeypatch.setattr(strategy, "PathRecorder", lambda *options: recorded.append(options) or recorder(*options))
    for number in range(8):
        CHANGED["on"] = number == odd
        require_equal(model, batch())
    assert len(paths_of(model)) == 1
    recorded.clear()
    for number in range(40):
        CHANGED["on"] = number % 2 == 0
        lgm.gradient_statistics(model, batch(), "pseudo_label")
    assert 0 < len(recorded) < 6


def test_new_values_tied_layers_and_chosen_parameters() -> None:
    torch.manual_seed(0)
    model = Net(CHANGES["a layer"]).double().eval()
    CHANGED["on"] = False
    for _ in range(4):
        require_equal(model, batch())
    with torch.no_grad():
        model.other.weight.mul_(2)
        model.norm.running_var.mul_(3)
    require_equal(model, batch())
    for _ in range(3):
        chosen = lgm.gradient_statistics(model, tokens := batch(), "uniform", lambda name: name.startswith("head"))
        expected = lgm.gradient_statistics(
            model, tokens, "uniform", lambda name: name.startswith("head"), engine="reference"
        )
        torch.testing.assert_close(chosen.norm(2), expected.norm(2))
    model.middle = model.other  # one layer, used twice
    for _ in range(4):
        require_equal(model, batch())
