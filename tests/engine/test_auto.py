"""The fast engine against the reference, on one model per supported feature."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gradmetrics.engine import auto, gradient_statistics, planned_batch
from lightning_gradmetrics.engine.passes.gather import MomentTable
from lightning_gradmetrics.gradients.statistics import STATISTICS
from tests.engine.cases import CASES, Packed, made, worst_difference

ALL = (*STATISTICS, "l1.5", "l3")


def _statistics(model, x, engine="auto", **options):
    options = {"statistics": ALL, "per_parameter": True} | options
    with warnings.catch_warnings():
        if engine == "auto":
            warnings.simplefilter("error")  # a parameter that falls back would warn
        warnings.filterwarnings("ignore", ".*padding='same' with even kernel.*")
        warnings.filterwarnings("ignore", ".*LSTM with projections is not supported with oneDNN.*")
        return gradient_statistics(model, x, options.pop("objective", "pseudo_label"), engine=engine, **options)


@pytest.mark.parametrize("name", CASES)
def test_equals_reference_in_float64(name):
    model, x = made(name)
    assert worst_difference(_statistics(model, x), _statistics(model, x, "reference")) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_equals_reference_in_float32(name):
    model, x = made(name, torch.float32)
    expected = _statistics(*made(name), "reference")
    assert worst_difference(_statistics(model, x), expected, floor=1e-2) < 1e-4


@pytest.mark.parametrize(
    "name", ["linear", "convolutional", "frames", "gru", "tied", "raw", "added_in_place", "checkpoint_reentrant"]
)
@pytest.mark.parametrize("size", [0, 1, 2])
def test_small_batches(name, size):
    model, x = made(name)
    found = _statistics(model, x[:size])
    assert found.max.shape == (size, len(found.names))
    assert worst_difference(found, _statistics(model, x[:size], "reference")) < 1e-9


def _without_plan(monkeypatch, model, batch, **options):
    """Return the statistics of a batch that is known, and fail if it is collected by a plan."""
    with monkeypatch.context() as context:
        context.setattr(planned_batch, "collect_fast", lambda *_, **__: pytest.fail("a plan was used"))
        return _statistics(model, batch, **options)


@pytest.mark.parametrize("name", ["linear", "volumes", "frames", "lstm", "tied", "encoder", "seq2seq", "checkpoint"])
@pytest.mark.parametrize("first", [1, 5])
def test_one_sample_of_a_proven_model_needs_an_ordinary_backward_pass_only(name, first, monkeypatch):
    model, x = made(name)
    frozen = next(model.parameters()).requires_grad_(False)
    frozen.grad = torch.ones_like(frozen)
    for size in (first, 1):
        _statistics(model, x[:size])
    found = _without_plan(monkeypatch, model, x[3:4])
    assert worst_difference(found, _statistics(model, x[3:4], "reference")) < 1e-9
    assert not frozen.requires_grad and bool((frozen.grad == 1).all())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in list(model.parameters())[1:])


@pytest.mark.parametrize("layer", [nn.EmbeddingBag, nn.Embedding])
def test_one_sample_that_looks_up_a_large_table_has_no_gradient_of_the_table(layer, monkeypatch):
    model = nn.Sequential(layer(5000, 64), nn.Flatten(), nn.Linear(64 * (1 if layer is nn.EmbeddingBag else 3), 4))
    x = torch.randint(5000, (5, 3))
    for size in (5, 1):
        _statistics(model, x[:size])
    with monkeypatch.context() as context:
        context.setattr(planned_batch, "collect_one_sample", lambda *_: pytest.fail("the table has a gradient"))
        found = _statistics(model, x[2:3])
    assert worst_difference(found, _statistics(model, x[2:3], "reference")) < 1e-4


def test_few_gradients_of_one_sample_are_reduced_together(monkeypatch):
    model, x = made("tied")
    for size in (5, 1):
        gradient_statistics(model, x[:size], ["pseudo_label", "uniform"])
    monkeypatch.setattr(MomentTable, "add", lambda *_: pytest.fail("a gradient was added alone"))
    found = gradient_statistics(model, x[2:3], ["pseudo_label", "uniform"])
    expected = gradient_statistics(model, x[2:3], ["pseudo_label", "uniform"], engine="reference")
    for own, other in zip(found, expected, strict=True):
        assert worst_difference(own, other) < 1e-9


@pytest.mark.parametrize("names", [("3.weight", "3.bias", "unused"), ("unused",)])
def test_one_sample_with_several_objectives_some_parameters_and_an_unused_one(names, monkeypatch):
    model, x = made("volumes")
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    objectives, chosen = ["pseudo_label", "uniform", "confounding"], lambda name: name in names
    for size in (5, 1):
        _statistics(model, x[:size], objective=objectives, parameters=chosen)
    found = _without_plan(monkeypatch, model, x[2:3], objective=objectives, parameters=chosen)
    expected = _statistics(model, x[2:3], "reference", objective=objectives, parameters=chosen)
    for own, other in zip(found, expected, strict=True):
        assert "unused" in own.names and worst_difference(own, other) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convolutional", "lstm", "raw", "seq2seq_second_axis", "tied", "minor"])
def test_any_order_and_any_split(name):
    model, x = made(name)
    whole, order = _statistics(model, x), torch.tensor([3, 0, 4, 1, 2])
    shuffled = _statistics(model, x[order])
    for memory in (1, 40_000):
        split = _statistics(model, x, memory=memory)
        assert worst_difference(split, whole) < 1e-9
    for key, value in shuffled.moments.items():
        torch.testing.assert_close(value, whole.moments[key][order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "convolutional", "encoder", "tied"])
@pytest.mark.parametrize("statistics", [("mean", "std", "l2"), ("l2",), ("max",), ("l1",), ("linf", "l3")])
def test_only_the_requested_statistics_are_computed(name, statistics):
    model, x = made(name)
    found, full = _statistics(model, x, statistics=statistics), _statistics(model, x, "reference")
    assert set(found.moments) < set(full.moments)
    for statistic in statistics:
        torch.testing.assert_close(found.statistic(statistic), full.statistic(statistic), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "frames", "lstm", "checkpoint", "checkpoint_reentrant"])
def test_several_objectives_share_one_forward(name):
    model, x = made(name)
    objectives = ["pseudo_label", "uniform", lambda z: z.square().sum(1), "confounding"]
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = _statistics(model, x, objective=objectives)
        calls.clear()
        _statistics(model, x, objective=objectives)
    finally:
        handle.remove()
    assert len(calls) == 1
    for one, objective in zip(found, objectives, strict=True):
        assert worst_difference(one, _statistics(model, x, "reference", objective=objective)) < 1e-9


@pytest.mark.parametrize("name", ["convolutional", "raw", "encoder"])
def test_chosen_parameters(name):
    model, x = made(name)
    names = [n for n, _ in model.named_parameters()]
    for keep in (names[:1], names[-1:], names[1::3]):
        found = _statistics(model, x, parameters=lambda n, keep=keep: n in keep)
        expected = _statistics(model, x, "reference", parameters=lambda n, keep=keep: n in keep)
        assert found.names == tuple(keep)
        assert worst_difference(found, expected) < 1e-9


def test_backward_stops_above_the_lowest_chosen_parameter():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)).double()
    x, seen = torch.randn(5, 4, dtype=torch.float64), []
    model[0].register_forward_hook(lambda _m, _i, out: seen.append(out.requires_grad))
    model[1].register_forward_hook(lambda _m, _i, out: seen.append(out.requires_grad))
    for _ in range(2):
        seen.clear()
        _statistics(model, x, parameters=lambda n: n.startswith("2"))
    assert seen == [False, False]


def test_rows_of_nan_do_not_affect_other_rows():
    model, x = made("convolutional")
    clean = _statistics(model, x)
    x = x.clone()
    x[0, 0, 0, 0], x[3] = float("nan"), float("inf")
    found = _statistics(model, x)
    rows = [1, 2, 4]
    for key, value in found.moments.items():
        torch.testing.assert_close(value[rows], clean.moments[key][rows], rtol=1e-9, atol=1e-12)
    assert not torch.isfinite(found.moments["sum"][0, 0])


def test_packed_sequences_fall_back_with_one_warning():
    model = Packed().eval().double()
    x = torch.randn(5, 5, 6, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"no fast rule for these parameters of Packed.*lstm\.weight_ih_l0") as caught:
        found = gradient_statistics(model, x, "pseudo_label", per_parameter=True, statistics=ALL)
    assert len(caught) == 1 and "head.weight" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient_statistics(model, x, "pseudo_label", statistics=("l2",))
    assert worst_difference(found, _statistics(model, x, "reference")) < 1e-9


class Hidden(torch.autograd.Function):
    """A function that torch's override mechanism does not intercept."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g * weight, (g * x).sum(0)


class WithHidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(Hidden.apply(x, self.scale))


def test_hidden_errors_are_found_by_the_verification():
    model, x = WithHidden().double(), torch.randn(5, 4, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"scale \(it is used outside of torch functions"):
        found = gradient_statistics(model, x, "pseudo_label", per_parameter=True, statistics=ALL)
    assert worst_difference(found, _statistics(model, x, "reference")) < 1e-9


class Changeable(nn.Module):
    """A model whose calls depend on its input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        if bool((x > 100).any()):
            x = self.a(x)
        return self.b(self.a(x))


def test_another_path_through_the_model_gets_a_new_plan():
    model, x = Changeable().double(), torch.randn(5, 4, dtype=torch.float64)
    for batch in (x, x + 1000, x):
        assert worst_difference(_statistics(model, batch), _statistics(model, batch, "reference")) < 1e-9


class ReusedInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.a(x)
        out = self.b(hidden)
        with torch.no_grad():
            hidden.zero_()
        return out


def test_changing_an_input_in_place_after_its_use_is_an_error():
    model, x = ReusedInput().double(), torch.randn(5, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        gradient_statistics(model, x, "pseudo_label")


@pytest.mark.slow
def test_compiled_module():
    model, x = made("linear")
    compiled = torch.compile(model)
    assert worst_difference(_statistics(compiled, x), _statistics(model, x, "reference")) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["linear", "encoder", "tied"])
def test_autocast(name, dtype):
    model, x = made(name, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        found, expected = _statistics(model, x), _statistics(model, x, "reference")
    assert worst_difference(found, expected) < 0.05
    assert all(value.dtype == torch.float64 for value in found.moments.values())


@pytest.mark.parametrize("name", ["convolutional", "lstm"])
def test_inside_inference_mode(name):
    model, x = made(name)
    expected = _statistics(model, x, "reference")
    with torch.inference_mode():
        assert worst_difference(_statistics(model, x.clone()), expected) < 1e-9


class _Views(nn.Module):
    """A model that accepts only images whose positions are adjacent in memory."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 5, 3), nn.Linear(180, 4)
        self.layouts = []

    def forward(self, x):
        self.layouts.append(x.is_contiguous())
        return self.head(self.conv(x).view(len(x), -1))


class _Grouped(nn.Module):
    """Calls the group norm as a function, with its own parameters."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return F.group_norm(x, 4, self.scale, self.shift)


@pytest.mark.parametrize("norm", [lambda: nn.GroupNorm(4, 8), _Grouped])
def test_group_norms_do_not_use_channels_last_where_their_variance_cancels(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(), nn.ReLU(), nn.Flatten(), nn.Linear(512, 3))
    with torch.no_grad():
        model[0].bias.add_(100)
    inputs = torch.randn(7, 3, 8, 8)
    found = gradient_statistics(model, inputs, "pseudo_label", per_parameter=True).statistic("l2")
    exact = gradient_statistics(model.double(), inputs.double(), "pseudo_label", per_parameter=True, engine="reference")
    torch.testing.assert_close(found.double(), exact.statistic("l2"), rtol=2e-3, atol=1e-6)


def test_images_use_channels_last_unless_the_model_fails():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    for model in (_Views(), nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(180, 4))):
        found = _statistics(model, x)
        assert worst_difference(found, _statistics(model, x, "reference"), floor=1e-2) < 1e-4
        ((strategy,),) = filter(None, auto._STRATEGIES[model].values())
        assert strategy.channels_last != isinstance(model, _Views) and not strategy.slow
        assert x.is_contiguous()


@pytest.mark.parametrize("samples", [4, 40])
@pytest.mark.parametrize(("outputs", "is_contiguous"), [(8, False), (16, True)])
def test_convolutions_with_large_weights_do_not_use_channels_last(outputs, is_contiguous, samples):
    """Torch would copy the weight to that layout twice. Probe and batch use the same layout, whatever their sizes are."""
    layouts = []

    class Recorded(nn.Conv2d):
        def forward(self, x):
            out = super().forward(x)
            layouts.append(out.is_contiguous())
            return out

    torch.manual_seed(0)
    conv = Recorded(8, outputs, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), conv, nn.Flatten(), nn.Linear(4 * outputs, 4))
    x = torch.randn(samples, 3, 8, 8)
    expected = _statistics(model, x, "reference")
    for _ in range(3):
        assert worst_difference(_statistics(model, x), expected, floor=1e-2) < 1e-4
    assert layouts[-1] == is_contiguous


def test_batch_norm_of_a_half_precision_model():
    """The engine replaces its backward pass if only its input is part of the graph."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)).eval()
    model[1].running_var.uniform_(0.5, 2)
    model[1].weight.data.uniform_(-1, 1)
    x = torch.randn(4, 3, 8, 8)
    expected = _statistics(model, x, "reference", statistics=("std", "l1"))
    found = _statistics(model.bfloat16(), x.bfloat16(), statistics=("std", "l1"))
    torch.testing.assert_close(found.norm(1), expected.norm(1), rtol=0.05, atol=0.05)


def test_a_custom_function_without_a_gradient_for_a_layer() -> None:
    class First(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:  # type: ignore[override]
            return first.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
            return gradient, None

    class Ignoring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(First.apply(self.first(x), self.second(x)).tanh())  # type: ignore[no-untyped-call]

    torch.manual_seed(0)
    model, x = Ignoring().double(), torch.randn(5, 4, dtype=torch.float64)
    with pytest.warns(UserWarning, match="no fast rule for these parameters"):
        found = gradient_statistics(model, x, "pseudo_label", per_parameter=True)
    expected = gradient_statistics(model, x, "pseudo_label", per_parameter=True, engine="reference")
    assert worst_difference(found, expected) < 1e-9
