"""Compiled plans equal the eager engine, and are refused with a reason where they could differ."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lightning_gradmetrics as lgm
from lightning_gradmetrics.engine import auto, gradient_statistics
from lightning_gradmetrics.engine.compilation import compiled as compiled_plans


def _errors(found, expected) -> float:
    errors = [0.0]
    for key, value in expected.moments.items():
        errors.append(float((found.moments[key] - value).abs().max() / value.abs().max()))
    return max(errors)


@pytest.fixture
def graphs(monkeypatch):
    """Graphs run as they are traced, without the minute that their compilation takes."""
    monkeypatch.setattr(compiled_plans, "compiled_graph", lambda graph, *_: graph)


@pytest.mark.slow
def test_a_compiled_plan_follows_inputs_labels_and_weights(graphs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    labels = torch.tensor([0, 1, 2, 1, 0])
    objectives = ["pseudo_label", "label"]

    def both(x, y):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            compiled = gradient_statistics(model, x, objectives, per_parameter=True, targets=y, compile=True)
        return compiled, gradient_statistics(model, x, objectives, per_parameter=True, targets=y)

    both(torch.randn(5, 4).double(), labels)
    before = auto._STRATEGIES[model]
    auto._STRATEGIES[model] = {}
    try:
        x = torch.randn(5, 4).double()
        compiled = gradient_statistics(model, x, objectives, per_parameter=True, targets=labels.flip(0), compile=True)
        assert not auto._STRATEGIES[model], "the compiled plan did not run"
    finally:
        auto._STRATEGIES[model] = before
    eager = gradient_statistics(model, x, objectives, per_parameter=True, targets=labels.flip(0))
    assert max(map(_errors, compiled, eager)) < 1e-8
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[1].running_mean.add_(0.3)
    for size in (5, 3):
        compiled, eager = both(torch.randn(size, 4).double(), labels[:size])
        assert max(map(_errors, compiled, eager)) < 1e-8
    model[2] = nn.Tanh()
    compiled, eager = both(torch.randn(3, 4).double(), labels[:3])
    assert max(map(_errors, compiled, eager)) < 1e-8


SLOPES = {"slope": 1.0}


class _OutsideFlag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) * SLOPES["slope"]


@pytest.mark.slow
def test_a_change_outside_of_the_model_ends_the_compiled_plan(graphs, monkeypatch):
    torch.manual_seed(0)
    model, x = _OutsideFlag(), torch.randn(5, 4)
    gradient_statistics(model, x, "pseudo_label", compile=True)
    monkeypatch.setitem(SLOPES, "slope", 2.0)
    with pytest.warns(UserWarning, match="no longer computes what was compiled"):
        compiled = gradient_statistics(model, x, "pseudo_label", compile=True)
    reference = gradient_statistics(model, x, "pseudo_label", engine="reference")
    torch.testing.assert_close(compiled.norm(1), reference.norm(1))


@pytest.mark.slow
def test_a_plan_compiled_by_inductor_equals_the_eager_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Sequential is not compiled")
        gradient_statistics(model, torch.randn(5, 4), "pseudo_label", compile=True)
    for x in (torch.randn(5, 4), torch.randn(4, 5).T, torch.randn(5, 8)[:, ::2]):  # kernels are made for one layout
        compiled = gradient_statistics(model, x, "pseudo_label", compile=True)
        assert _errors(compiled, gradient_statistics(model, x, "pseudo_label")) < 1e-5
    assert all(program.calls is not None for program in compiled_plans._PROGRAMS[model].values())


class _Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) if bool((x.abs() < 1e9).all()) else self.layer(-x)


class _SharedTable(_Branch):
    def forward(self, x, table):
        return self.layer(x) + table.mean(0)


def test_a_shared_input_of_another_length_has_its_own_plan(graphs):
    torch.manual_seed(0)
    model, axes = _SharedTable(), {"x": 0, "table": None}
    for rows in (7, 9, 7):
        inputs = {"x": torch.randn(5, 4), "table": torch.randn(rows, 3)}
        options = {"statistics": ["l2"], "sample_axis": axes}
        compiled = gradient_statistics(model, inputs, "pseudo_label", compile=True, **options)
        expected = gradient_statistics(model, inputs, "pseudo_label", engine="reference", **options)
        assert _errors(compiled, expected) < 1e-5
    assert len(compiled_plans._PROGRAMS[model]) == 2


class _Unregistered(_Branch):
    def __init__(self) -> None:
        super().__init__()
        self.factors = torch.tensor([1.0, 2.0, 3.0])

    def forward(self, x):
        return self.layer(x) * self.factors


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.layers(x[:, :, None])[0][:, -1])


@pytest.mark.parametrize("kind", [_Branch, _Unregistered, _Recurrent])
def test_models_whose_graph_could_change_or_is_slower_run_eagerly(kind, graphs):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(5, 4)
    with pytest.warns(UserWarning, match="runs eagerly"):
        first = gradient_statistics(model, x, "pseudo_label", compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = gradient_statistics(model, x, "pseudo_label", compile=True)
    assert _errors(again, first) == 0


SCALE = {"backward": 1.0}


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * SCALE["backward"]


class _CustomBackward(_Branch):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(_Scaled.apply(self.first(x)))


def test_a_backward_pass_that_changes_later_is_not_compiled(graphs, monkeypatch):
    torch.manual_seed(0)
    model, x = _CustomBackward(), torch.randn(5, 4)
    options = {"statistics": ["l2"], "per_parameter": True}
    with pytest.warns(UserWarning, match="custom code"):
        gradient_statistics(model, x, "pseudo_label", compile=True, **options)
    monkeypatch.setitem(SCALE, "backward", 3.0)
    compiled = gradient_statistics(model, x, "pseudo_label", compile=True, **options)
    assert _errors(compiled, gradient_statistics(model, x, "pseudo_label", engine="reference", **options)) < 1e-5


class _Splines(_Branch):
    def forward(self, x):
        bases = torch.exp(-((x[..., None] - torch.arange(2.0)) ** 2)).sum(2)
        return torch.einsum("ni,oi->no", bases, self.layer.weight) + self.layer.bias


def test_products_written_as_einsum_are_compiled(graphs):
    torch.manual_seed(0)
    model, x = _Splines(), torch.randn(5, 4)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            compiled = gradient_statistics(model, x, "pseudo_label", statistics=["l1", "l2"], compile=True)
        expected = gradient_statistics(model, x, "pseudo_label", statistics=["l1", "l2"], engine="reference")
        assert _errors(compiled, expected) < 1e-5


def test_a_module_with_two_names_and_tied_weights_are_compiled(graphs):
    layer, tied = nn.Linear(5, 5), nn.Linear(5, 5)
    tied.weight = layer.weight
    model, x = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), tied, nn.Linear(5, 3)).eval(), torch.randn(7, 5)
    found = gradient_statistics(model, x, "pseudo_label", compile=True)
    expected = gradient_statistics(model, x, "pseudo_label", engine="reference")
    torch.testing.assert_close(found.norm(2), expected.norm(2))
    assert model[0].weight is tied.weight is layer.weight


@pytest.mark.slow
@pytest.mark.parametrize("statistics", [("l2",), ("l1", "l2", "max", "min", "mean")])
@pytest.mark.parametrize("convolves", [False, True])
def test_models_with_unused_parameters_are_compiled(convolves, statistics, graphs):
    """The gradients of these parameters are zero, in every batch."""
    torch.manual_seed(0)
    first = nn.Conv2d(2, 4, 3) if convolves else nn.Flatten()
    model = nn.Sequential(first, nn.Flatten(), nn.Linear(16 if convolves else 32, 3)).eval()
    first.register_parameter("unused", nn.Parameter(torch.ones(2, 3)))
    for _ in range(4):
        x = torch.randn(5, 2, 4, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            found = gradient_statistics(
                model, x, "pseudo_label", per_parameter=True, statistics=statistics, compile=True
            )
    assert all(compiled_plans._PROGRAMS[model].values())
    expected = gradient_statistics(
        model, x, "pseudo_label", per_parameter=True, statistics=statistics, engine="reference"
    )
    for name in statistics:
        torch.testing.assert_close(found.statistic(name), expected.statistic(name), rtol=1e-4, atol=1e-6)


def test_scores_of_the_compiled_engine_are_those_of_the_eager_one(graphs):
    torch.manual_seed(0)
    model, score = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), "pseudo_label(target=all)"
    for _ in range(3):
        x = torch.randn(5, 4)
        compiled = lgm.score(model, x, score, engine="compiled")[score]
        torch.testing.assert_close(compiled, lgm.score(model, x, score)[score])


def test_compile_needs_the_fast_engine():
    with pytest.raises(ValueError, match="engine='auto'"):
        gradient_statistics(nn.Linear(4, 3), torch.randn(2, 4), "uniform", engine="vmap", compile=True)


def test_a_flop_counter_has_no_effect_on_this_call_or_later_ones():
    """Under a dispatch mode the operators of the backward pass reach the tracer again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).eval()
    x = torch.randn(4, 1, 6, 6)
    expected = gradient_statistics(model, x, "pseudo_label")
    kept = [list(known) for known in auto._STRATEGIES[model].values()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with FlopCounterMode(display=False):
            counted = gradient_statistics(model, x, "pseudo_label")
        later = gradient_statistics(model, x, "pseudo_label")
    assert _errors(counted, expected) < 1e-5 and _errors(later, expected) == 0
    after = [list(known) for known in auto._STRATEGIES[model].values()]
    assert kept == after and len(kept[0]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("statistics", [("l2",), ("l1", "l2", "max", "min", "mean")])
@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(8, 64, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(256, 3)),  # sums of squares by Gram matrices
        (nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, 3)),
        (nn.Flatten(2), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 4), nn.Flatten(), nn.Linear(32, 3)),
        (nn.Flatten(), nn.Embedding(9, 4, padding_idx=2), nn.Flatten(), nn.Linear(512, 3)),
    ],
    ids=["convolution", "depthwise", "sequence", "embedding"],
)
def test_kernels_of_layers_are_operators_of_the_graph(layers, statistics, graphs):
    torch.manual_seed(0)
    model = nn.Sequential(*layers).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(4):
            x = torch.randn(5, 8, 4, 4) if not isinstance(layers[1], nn.Embedding) else torch.randint(9, (5, 8, 4, 4))
            found = gradient_statistics(model, x, "pseudo_label", statistics=statistics, compile=True)
    (program,) = compiled_plans._PROGRAMS[model].values()
    graph = str(program.run.graph)
    assert "lightning_gradmetrics" in graph
    assert "native_sums" not in graph  # operators of weights return the gradients of biases too
    expected = gradient_statistics(model, x, "pseudo_label", statistics=statistics, engine="reference")
    for name in statistics:
        torch.testing.assert_close(found.statistic(name), expected.statistic(name), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e20])
def test_batches_whose_squares_overflow_or_vanish_run_eagerly(size):
    """In single precision; all later batches are compiled again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)).eval()
    batches = [torch.randn(8, 4) for _ in range(8)]
    batches[1][2] *= size
    batches[5][2] *= size
    for x in batches:
        found = gradient_statistics(model, x, "uniform", per_parameter=True, statistics=["l2"], compile=True)
        expected = gradient_statistics(model, x, "uniform", per_parameter=True, statistics=["l2"])
        torch.testing.assert_close(found.norm(2), expected.norm(2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("statistics", [("l3",), ("l2", "l3"), ("l2",)])
def test_other_powers_of_small_gradients(statistics, graphs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)).eval()
    options = {"per_parameter": True, "statistics": statistics}
    for size in (1.0, 1.0, 1e-22):
        x = torch.randn(8, 4)
        x[2] *= size
        found = gradient_statistics(model, x, "uniform", compile=True, **options)
    expected = gradient_statistics(model, x, "uniform", **options)
    for name in statistics:
        torch.testing.assert_close(found.statistic(name), expected.statistic(name), rtol=1e-4, atol=0)


def test_gradients_of_zeros_stay_compiled(graphs, monkeypatch):
    """Of a layer whose ReLU never fires, and of a sample of zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    nn.init.constant_(model[2].bias, -100)
    options = {"per_parameter": True, "statistics": ["l2"]}
    x = torch.randn(8, 4)
    gradient_statistics(model, x, "uniform", compile=True, **options)
    x[1] = 0
    expected = gradient_statistics(model, x, "uniform", **options)
    monkeypatch.setattr(compiled_plans, "auto_moments", None)
    found = gradient_statistics(model, x, "uniform", compile=True, **options)
    assert not found.norm(2)[:, :5].any()
    torch.testing.assert_close(found.norm(2), expected.norm(2), rtol=1e-5, atol=0)
