"""Later batches repeat a known forward pass with less work per call, and notice every change of it."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_gradmetrics as lgm
from lightning_gradmetrics.engine.auto import _STRATEGIES
from lightning_gradmetrics.engine.kernels.segments import Segments
from lightning_gradmetrics.engine.passes import path_record, strategy
from lightning_gradmetrics.engine.passes.path_check import PathFollower

CHANGED: dict[str, Any] = {"on": False}
"""State that is not part of any model, so that no key of a strategy shows its changes."""


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


def is_on() -> bool:
    return bool(CHANGED["on"])


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


def paths_of(model: nn.Module) -> list[Any]:
    """Return the known paths of a model."""
    found = []
    for strategies in _STRATEGIES[model].values():
        for known in strategies:
            found += known.paths.values()
    return found


def batch() -> Tensor:
    tokens = torch.randint(30, (5, 3))
    tokens[:, 2] = tokens[:, 0]  # a row that is looked up twice
    return tokens


def require_equal(model: nn.Module, tokens: Tensor) -> None:
    """Require the statistics of the slow engine, for two objectives."""
    objectives = ["pseudo_label", "uniform"]
    results = lgm.gradient_statistics(model, tokens, objectives, per_parameter=True)
    expected = lgm.gradient_statistics(model, tokens, objectives, per_parameter=True, engine="reference")
    for one, other in zip(results, expected, strict=True):
        for key, value in other.moments.items():
            torch.testing.assert_close(one.moments[key], value, rtol=1e-9, atol=1e-12)


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


def test_a_large_path_stores_no_result_longer_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(path_record, "MOST_BYTES", 0)
    alive: list[int] = []
    results: list[ref[Tensor]] = []

    def end(h: Tensor) -> Tensor:
        for _ in range(5):
            h = h.neg()  # stores nothing for its backward pass
            results.append(ref(h))
        alive.append(sum(result() is not None for result in results))
        results.clear()
        return h * 2

    model = InOrder(end).double().eval()
    require_known_path(model)
    x = torch.randn(5, 6, dtype=torch.float64)
    lgm.gradient_statistics(model, x, "uniform")
    assert alive[-1] == 1


@pytest.mark.parametrize(
    "make", [lambda: InOrder(lambda h: h.exp() if is_on() else h.neg()), lambda: Repeated()], ids=["direct", "planned"]
)
def test_nothing_of_a_large_path_stays_alive(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph has hooks that refer to the pass. If this had the logits, no garbage collector would find the cycle."""
    torch.manual_seed(0)
    monkeypatch.setattr(path_record, "MOST_BYTES", 0)
    monkeypatch.setitem(CHANGED, "on", False)
    passes: list[ref[Any]] = []
    follow = PathFollower.follow

    def noted(self: PathFollower, *given: Any) -> None:
        passes.append(ref(self))
        follow(self, *given)

    monkeypatch.setattr(PathFollower, "follow", noted)
    model = make().double().eval()
    require_known_path(model)
    CHANGED["on"] = True
    lgm.gradient_statistics(model, torch.randn(5, 6, dtype=torch.float64), "uniform")
    gc.collect()
    assert passes and not any(one() is not None for one in passes)


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


class Repeated(nn.Module):
    """Uses one layer several times, with one position per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.body(x).tanh()) @ self.body.weight)


def test_a_layer_that_is_used_several_times() -> None:
    torch.manual_seed(0)
    model = Repeated().double().eval()
    for _ in range(4):
        require_equal(model, torch.randn(5, 6, dtype=torch.float64))
    (path,) = paths_of(model)
    assert path is not None and not path.is_direct


class Unused(nn.Module):
    """Has a parameter that its forward pass does not use, and a buffer with a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.ones(6, requires_grad=True))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_no_parameter_is_used() -> None:
    model = Unused().double()
    for _ in range(4):
        statistics = lgm.gradient_statistics(model, torch.randn(5, 6, dtype=torch.float64), "uniform")
        assert not statistics.norm(1).any()


class InOrder(nn.Module):
    """Calls its layers in their order; ``end`` changes the logits."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.end = nn.Linear(6, 6), nn.Linear(6, 6), end

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x).tanh()
        return self.end(x)


def require_known_path(model: nn.Module) -> None:
    """Run four right batches of five samples, after which a path is known."""
    for _ in range(4):
        require_equal(model, torch.randn(5, 6, dtype=torch.float64))
    assert any(path is not None for path in paths_of(model)), "no path is known"


@pytest.mark.parametrize("is_large", [False, True])
def test_only_moments_over_all_parameters_are_computed_if_no_others_are_read(
    is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_large:
        monkeypatch.setattr(path_record, "MOST_BYTES", 0)
    only_merged: list[bool] = []
    statistics = Segments.statistics
    monkeypatch.setattr(Segments, "statistics", lambda *args: only_merged.append(args[-1]) or statistics(*args))
    torch.manual_seed(0)
    model, x = InOrder(nn.functional.softplus).double().eval(), torch.randn(5, 6, dtype=torch.float64)
    require_known_path(model)
    assert not any(only_merged)
    objectives = ["pseudo_label", "uniform"]
    results = lgm.gradient_statistics(model, x, objectives)
    assert all(only_merged[-2:])
    for one, other in zip(results, lgm.gradient_statistics(model, x, objectives, engine="reference"), strict=True):
        for key, value in other.moments.items():
            torch.testing.assert_close(one.moments[key], value, rtol=1e-9, atol=1e-12)


def test_chosen_layers_in_another_order() -> None:
    torch.manual_seed(0)
    model = InOrder(nn.functional.softplus).double().eval()
    for number in range(7):
        if number == 4:
            model._modules["body"] = model._modules.pop("body")  # the last one
        x = torch.randn(5, 6, dtype=torch.float64)
        of_head = [
            lgm.gradient_statistics(model, x, "uniform", lambda name: "head" in name, engine=engine).norm(2)
            for engine in ("auto", "reference")
        ]
        torch.testing.assert_close(*of_head)


@pytest.mark.parametrize("is_in_place", [False, True])
def test_logits_that_a_dispatcher_operator_couples_later(is_in_place: bool) -> None:
    """No function mode sees a dispatcher operator at the end of a forward pass."""
    torch.manual_seed(0)

    def end(logits: Tensor) -> Tensor:
        if not is_on():
            return logits
        mean = torch.ops.aten.mean.dim(logits, [0], True)
        subtract = torch.ops.aten.sub_.Tensor if is_in_place else torch.ops.aten.sub.Tensor
        return subtract(logits, mean)

    CHANGED["on"] = False
    model = InOrder(end).double().eval()
    require_known_path(model)
    CHANGED["on"] = True
    try:
        with pytest.raises(ValueError, match="depend on each other"):
            lgm.gradient_statistics(model, torch.randn(5, 6, dtype=torch.float64), "uniform")
    finally:
        CHANGED["on"] = False


@pytest.mark.parametrize("later", [True, False], ids=["in a later batch", "in larger batches"])
def test_buffers_that_a_dispatcher_operator_changes(later: bool) -> None:
    """No function mode sees a dispatcher operator, but the buffer has a new version."""
    torch.manual_seed(0)

    def end(logits: Tensor) -> Tensor:
        if is_on() if later else len(logits) > 8:
            torch.ops.aten.copy_.default(model.offset, torch.ops.aten.mean.dim(logits, [0]))
        return logits - model.offset

    CHANGED["on"] = False
    model: Any = InOrder(end).double().eval()
    model.register_buffer("offset", torch.ones(6, dtype=torch.float64))
    require_known_path(model)
    CHANGED["on"] = later
    try:
        with pytest.raises(ValueError, match="depend on each other"):
            lgm.gradient_statistics(model, torch.randn(5 if later else 12, 6, dtype=torch.float64), "uniform")
    finally:
        CHANGED["on"] = False
    assert torch.equal(model.offset, torch.ones(6, dtype=torch.float64))


def changed_by_an_operator(h: Tensor) -> Tensor:
    """Return twice ``h + 1``; in later batches an operator that no function mode sees doubles it."""
    shifted = h + 1
    return torch.ops.aten.mul_.Tensor(shifted, 2.0) if is_on() else shifted * 2


ENDS: dict[str, Any] = {
    "a result changed by an operator": changed_by_an_operator,
    "an activation in place": lambda h: F.relu(h + 0.5, inplace=True),
    "nothing": lambda h: h,
}


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("name", ENDS)
def test_direct_passes(name: str, is_large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_large:
        monkeypatch.setattr(path_record, "MOST_BYTES", 0)
    torch.manual_seed(0)
    CHANGED["on"] = False
    model = nn.Sequential(nn.Linear(6, 6), InOrder(ENDS[name]), nn.Linear(6, 4))
    require_known_path(model.double().eval())
    (path,) = paths_of(model)
    assert path.is_direct and path.is_pure == (name != "an activation in place" and not is_large)
    CHANGED["on"] = True
    try:
        require_equal(model, torch.randn(5, 6, dtype=torch.float64))
    finally:
        CHANGED["on"] = False


def test_one_layer_and_functions_of_several_calls() -> None:
    torch.manual_seed(0)
    require_known_path(nn.Linear(6, 3).double().eval())
    bags = nn.Sequential(nn.EmbeddingBag(30, 6, padding_idx=0), nn.BatchNorm1d(6), nn.Linear(6, 3)).double().eval()
    for _ in range(4):
        require_equal(bags, batch())
    (path,) = paths_of(bags)
    assert path.is_direct and path.calls[1].inner and path.calls[2].inner


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "einsum": lambda h, weight: torch.einsum("ni,oi->no", h, weight),
    "matmul with a transposed weight": lambda h, weight: h @ weight.t(),
    "linear with a scaled weight": lambda h, weight: F.linear(h, weight * 2),
    "linear with a reshaped weight": lambda h, weight: F.linear(h, weight.reshape(2, 3, 6).flatten(0, 1)),
    "element by element": lambda h, weight: (h[:, None] * weight).sum(2),
}
"""Uses of a parameter without a layer of torch."""


class Product(nn.Module):
    """A classifier without layers of torch."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.product = nn.Parameter(torch.randn(6, 6, dtype=torch.float64)), product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)


@pytest.mark.parametrize("name", PRODUCTS)
def test_models_without_layers(name: str) -> None:
    torch.manual_seed(0)
    model = Product(PRODUCTS[name])
    for _ in range(4):
        require_equal(model, torch.randn(5, 6, dtype=torch.float64))


def test_inputs_by_keyword() -> None:
    torch.manual_seed(0)
    model: Any = InOrder(lambda logits: F.linear(input=logits, weight=model.weight))
    model.weight = nn.Parameter(torch.randn(6, 6))
    require_known_path(model.double().eval())


class _Scaled(nn.Module):
    """Multiplies the logits by a tensor that is no parameter, or by a parameter that is not chosen."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(6, 4), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


@pytest.mark.parametrize("kind", [nn.Parameter, nn.Buffer, Tensor.clone])
@pytest.mark.parametrize("calls", [1, 4])
def test_a_tensor_of_the_model_gets_one_row_per_sample(kind: Callable[[Tensor], Tensor], calls: int) -> None:
    model, x = _Scaled(kind(torch.ones(4))).eval(), torch.randn(5, 6)
    for _ in range(calls):
        lgm.gradient_statistics(model, x, "pseudo_label", lambda name: name != "scale")
    model.scale.data = torch.rand(5, 4)
    with pytest.raises(ValueError, match="expected one row per sample"):
        lgm.gradient_statistics(model, x, "pseudo_label", lambda name: name != "scale")
