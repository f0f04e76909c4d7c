"""Known paths of models with few layers: which calls they have, what they store, and operators that no function mode sees."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_gradmetrics as lgm
from lightning_gradmetrics.engine.kernels.segments import Segments
from lightning_gradmetrics.engine.passes import path_record
from lightning_gradmetrics.engine.passes.path_check import PathFollower
from tests.engine.known_paths import CHANGED, InOrder, batch, is_on, paths_of, require_equal, require_known_path


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
