"""The collector and its metrics, side by side with the package gradient_metrics, and where that package fails."""

from __future__ import annotations

import copy
import gc
import io
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradmetrics.compat.gradient_metrics import metrics as ours
from lightning_gradmetrics.compat.gradient_metrics import watching
from lightning_gradmetrics.compat.gradient_metrics.collector import GradientMetricCollector
from lightning_gradmetrics.compat.gradient_metrics.listener import HEARD
from tests.engine.cases import made
from tests.models import fast_rows

theirs = pytest.importorskip("gradient_metrics.metrics")
Theirs = pytest.importorskip("gradient_metrics").GradientMetricCollector


def _count_large(kind):
    class CountLarge(kind.GradientMetric):
        """A user's metric."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.reset()

        def _collect(self, grad):
            self.buffer = self.buffer + (grad.abs() > 1e-2).sum()

        def _get_metric(self):
            return self.buffer

        def reset(self):
            self.buffer = torch.tensor(0.0)

    return CountLarge


def _build(kind, collector, model, layers):
    return collector(
        [
            kind.Max(model),
            kind.Min(model),
            kind.Mean(layers),
            kind.MeanStd(model),
            kind.MeanStd(layers[0], return_mean=False, eps=1e-3),
            kind.PNorm(model),
            kind.PNorm(layers, p="inf"),
            kind.PNorm(layers[-1], p=0.5),
            kind.Max(model, grad_transform=lambda g: g.abs().sqrt()),
            kind.PNorm(model, lambda g: g * 2, 2),
            _count_large(kind)(model),
        ]
    )


def _layers(model):
    return [child for child in model.children() if any(True for _ in child.parameters())]


def _loss(model, x):
    logits = model(x)
    return F.cross_entropy(logits, logits.argmax(1), reduction="none")


@pytest.fixture(autouse=True)
def _strict():
    torch.set_num_threads(1)  # small tensors are slower on several
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*padding='same' with even kernel.*")
        warnings.filterwarnings("ignore", ".*torch.jit.script.*")  # torch.func.jvp, the first time
        yield


@pytest.mark.parametrize(
    "name", ["linear", "convolutional", "sequences", "frames", "lstm", "encoder", "tied", "checkpoint", "minor"]
)
def test_side_by_side(name):
    model, x = made(name)
    collector = _build(ours, GradientMetricCollector, model, _layers(model))
    for batch in (x, x[:3], x[:1]):
        expected = _build(theirs, Theirs, model, _layers(model))(_loss(model, batch))
        found = collector(_loss(model, batch))
        assert found.shape == expected.shape == (len(batch), collector.dim)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("grad", [torch.randn(3, 4), torch.tensor([2.5]), [torch.randn(2), torch.randn(3, 2)]])
def test_a_metric_without_a_collector(grad):
    layer = nn.Linear(2, 2)
    for one, other in zip(
        _build(ours, GradientMetricCollector, layer, [layer])._metrics,
        _build(theirs, Theirs, layer, [layer])._metrics,
        strict=True,
    ):
        torch.testing.assert_close(one.data, other.data)
        for _ in range(2):
            one(grad)
            other(grad)
        torch.testing.assert_close(one.data, other.data)
        one.reset()
        other.reset()
        torch.testing.assert_close(one.data, other.data)


def test_data_and_dim_and_reset():
    model = nn.Linear(3, 2)
    collector = GradientMetricCollector((ours.Max(model), ours.MeanStd(model)))
    assert collector.dim == 3
    collector._metrics[0](torch.ones(2))
    torch.testing.assert_close(collector.data, torch.tensor([1.0, 0.0, 1e-16]))
    collector(_loss(model, torch.randn(2, 3)))
    assert collector.data[0] == -torch.inf


@pytest.mark.parametrize("kind, collector", [(ours, GradientMetricCollector), (theirs, Theirs)])
def test_errors(kind, collector):
    model = nn.Linear(3, 2)
    for wrong in ([], [1], "max", None):
        with pytest.raises(ValueError):
            collector(wrong)
    for p in (0, -1, "one"):
        with pytest.raises(ValueError):
            kind.PNorm(model, p=p)
    with pytest.raises(ValueError):
        kind.MeanStd(model, eps=0)
    with pytest.raises(ValueError):
        collector(kind.Max(model))(torch.ones(3))
    with pytest.raises(ValueError):
        collector(kind.Max(model))(model(torch.randn(4, 3)))
    with pytest.raises(NotImplementedError):
        kind.GradientMetric(model)(torch.ones(2))
    with pytest.raises(NotImplementedError):
        kind.GradientMetric(model).data
    with pytest.raises(NotImplementedError):
        kind.GradientMetric(model).reset()


def test_inference_mode_is_an_error_with_advice():
    model = nn.Linear(3, 2)
    collector = GradientMetricCollector(ours.Max(model))
    with torch.inference_mode():
        loss = _loss(model, torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"inference_mode\(False\).*gradient_statistics"):
        collector(loss)


def test_one_backward_for_the_whole_batch():
    """Two further backward passes reach only the logits; they determine the sample of each loss."""
    model, x = made("convolutional")
    collector = GradientMetricCollector([ours.Max(model), ours.PNorm(model, lambda g: g)])
    at_logits, inside = [], []
    model[9].register_forward_hook(lambda *call: call[2].register_hook(inside.append) and None)
    for _ in range(4):
        at_logits.clear()
        inside.clear()
        logits = model(x)
        logits.register_hook(at_logits.append)
        collector(F.cross_entropy(logits, logits.argmax(1), reduction="none"))
    assert (len(at_logits), len(inside)) == (3, 1)


def test_channels_last():
    model, x = made("channels_last")
    plain, _ = made("convolutional")
    plain.load_state_dict(model.state_dict())
    collector = _build(ours, GradientMetricCollector, model, _layers(model))
    expected = _build(theirs, Theirs, plain, _layers(plain))(_loss(plain, x.contiguous()))
    torch.testing.assert_close(collector(_loss(model, x)), expected, rtol=1e-5, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("frozen", [(0,), (2,), (0, 2)])
def test_frozen_layers_have_the_same_metrics(frozen):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    expected = _build(theirs, Theirs, model, _layers(model))(_loss(model, x))
    for index in frozen:
        model[index].requires_grad_(False)
    found = _build(ours, GradientMetricCollector, model, _layers(model))(_loss(model, x))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8, check_dtype=False)
    assert [p.requires_grad for p in model.parameters()] == [i not in frozen for i in (0, 0, 2, 2)]


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


def test_unused_parameters_have_zero_gradients():
    model, x = Unused(), torch.randn(5, 4)
    collector = GradientMetricCollector([ours.Mean(model), ours.Max(model.unused), ours.Max(model, torch.abs)])
    found = collector(_loss(model, x))
    part = Theirs([theirs.Mean(model.used), theirs.Max(model.used, torch.abs)])(_loss(model, x))
    torch.testing.assert_close(found, torch.stack([part[:, 0] * 15 / 21, torch.zeros(5), part[:, 1]], 1))


@pytest.mark.slow
def test_retain_graph_and_the_users_own_backward():
    model, x = made("convolutional")
    collector = GradientMetricCollector(ours.PNorm(model))
    loss = _loss(model, x)
    first, second = collector(loss, retain_graph=True), collector(loss, retain_graph=True)
    torch.testing.assert_close(first, second)
    assert all(p.grad is None for p in model.parameters())
    loss.mean().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    del collector
    gc.collect()
    _loss(model, x).mean().backward()
    for one, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)


def test_without_retain_graph_the_graph_is_freed():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)
    collector = GradientMetricCollector(ours.PNorm(model))
    collector(_loss(model, x))
    loss = _loss(model, x)
    collector(loss)
    with pytest.raises(RuntimeError, match="second time"):
        loss.sum().backward()


def test_several_forward_passes():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(2, 6, 4, dtype=torch.float64)
    collector = _build(ours, GradientMetricCollector, model, _layers(model))
    reference = _build(theirs, Theirs, model, _layers(model))
    kept = _loss(model, y)
    first, second = _loss(model, x), _loss(model, y)
    for loss in (first + second, second, first * 2):
        expected = reference(loss, retain_graph=True)
        torch.testing.assert_close(
            collector(loss, retain_graph=True), expected, rtol=1e-6, atol=1e-8, check_dtype=False
        )
    del kept


@pytest.mark.parametrize("target", ["tensor", "before", "second_axis", "train"])
def test_unrecorded_forward_passes_use_the_loop(target):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    model.train(target == "train")
    if target == "second_axis":
        model = nn.Sequential(*model, nn.Unflatten(1, (3, 1)))
    layers = {"tensor": model[0].weight, "second_axis": model[-2]}.get(target, model)
    early = _loss(model, x) if target == "before" else None
    collector = GradientMetricCollector([ours.Max(layers), ours.PNorm(layers)])
    reference = Theirs([theirs.Max(layers), theirs.PNorm(layers)])
    if target == "second_axis":
        loss = model(x)[:, :, 0].square().mean(0)  # three "samples" that are columns, not rows
    else:
        loss = _loss(model, x) if early is None else early
    expected = reference(loss, retain_graph=True)
    with pytest.warns(UserWarning, match="one backward pass per loss"):
        found = collector(loss)
    torch.testing.assert_close(found, expected, check_dtype=False)


@pytest.mark.slow
def test_the_model_keeps_no_hooks():
    model, x = made("convolutional")

    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    before = hooks()
    collector = GradientMetricCollector([ours.Max(model), ours.Max(model[0])])
    assert hooks() != before
    copied = copy.deepcopy(model)
    torch.save(model, io.BytesIO())
    copied(x)
    loss = _loss(model, x)
    collector(loss)
    del collector, loss
    gc.collect()
    assert hooks() == before


def test_an_error_in_the_forward_pass_ends_its_recording():
    model = nn.Sequential(nn.Linear(4, 3))
    collector = GradientMetricCollector(ours.Max(model))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(5, 4))
        model(torch.randn(5, 7))
    loss = _loss(model, torch.randn(5, 4))
    expected = Theirs(theirs.Max(model))(_loss(model, torch.zeros(5, 4)) + loss, retain_graph=True)
    assert collector(loss).shape == expected.shape


@pytest.mark.slow
def test_activations_are_not_kept():
    model = nn.Sequential(nn.Linear(4, 3))
    collector = GradientMetricCollector(ours.Max(model))
    loss = _loss(model, torch.randn(5, 4))
    gc.collect()
    assert len(HEARD) == 1
    collector(loss, retain_graph=True)
    del loss
    gc.collect()
    assert len(HEARD) == 0


def test_an_empty_batch():
    model = nn.Linear(4, 3)
    collector = GradientMetricCollector([ours.Max(model), ours.MeanStd(model)])
    assert collector(_loss(model, torch.randn(0, 4))).shape == (0, 3)


# -- losses and samples -------------------------------------------------------------------------------------------------


def _small():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
    return model, lambda rows=slice(None): F.cross_entropy(model(x[rows]), y[rows], reduction="none")


def _norms(collector_class, kind, model):
    return collector_class([kind.Max(model), kind.MeanStd(model), kind.PNorm(model, p=2), kind.PNorm(model, abs, 1)])


FAST = {
    "a part": lambda losses: losses()[2:5],
    "every other one": lambda losses: losses()[::2],
    "a mask": lambda losses: losses()[torch.arange(8) % 3 == 1],
    "reversed": lambda losses: losses().flip(0),
    "sorted": lambda losses: losses().sort().values,
    "shuffled and scaled": lambda losses: losses()[torch.tensor([3, 1, 0, 7, 2])] * torch.tensor([1, -2, 3, 1, 1e-9]),
    "one of two equal samples": lambda losses: losses(slice(0, 1)),
    "unequal forward passes": lambda losses: torch.cat([losses(slice(0, 2)), losses(slice(2, 8))]),
    "interleaved forward passes": lambda losses: torch.stack([losses(slice(0, 4)), losses(slice(4, 8))], 1).flatten(),
    "two views": lambda losses: losses() + losses() ** 2,
    "a constant": lambda losses: torch.cat([losses(), torch.zeros(2, dtype=torch.float64)]),
    "without gradients": lambda losses: losses() * torch.tensor([1, 0, 1, 1, 0, 1, 1, 1]),
}
SLOW = {
    "some twice": lambda losses: losses()[[0, 0, 1, 1, 2, 2, 3, 3]],
    "one twice, none of the others": lambda losses: losses()[[0, 0]],
    "centred": lambda losses: (lambda values: values - values.mean())(losses()),
    "cumulated": lambda losses: losses().cumsum(0),
    "pairs": lambda losses: losses().view(4, 2).sum(1),
    "differences": lambda losses: losses()[1:] - losses()[:-1],
    "one for the whole batch": lambda losses: losses().sum()[None],
    "views of other samples": lambda losses: losses() + losses().flip(0),
}


@pytest.mark.parametrize("before", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_losses_in_a_different_number_or_order_than_the_samples(name, before):
    model, losses = _small()
    collector, reference = _norms(GradientMetricCollector, ours, model), _norms(Theirs, theirs, model)
    if before:
        collector(losses())
    expected = reference((FAST | SLOW)[name](losses))
    expectation = pytest.warns(UserWarning, match="one backward pass per loss") if name in SLOW else nullcontext()
    with expectation:
        found = collector((FAST | SLOW)[name](losses))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, check_dtype=False)


def test_many_losses_are_assigned_to_their_samples():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, order = torch.randn(1000, 4), torch.randperm(1000)
    collector = GradientMetricCollector(ours.PNorm(model, p=2))
    first = collector(_loss(model, x))
    torch.testing.assert_close(collector(_loss(model, x)[order]), first[order])


def test_confident_samples_stay_fast():
    """The gradients of confident losses are small differences of numbers near one."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    collector = GradientMetricCollector(ours.PNorm(model, p=1))
    with torch.no_grad():
        model[2].weight *= 100
    x = torch.randn(64, 4)
    expected = Theirs(theirs.PNorm(model, p=1))(_loss(model, x))
    torch.testing.assert_close(collector(_loss(model, x)), expected, rtol=1e-4, atol=1e-12)


def test_a_loss_that_is_not_finite_does_not_affect_other_rows():
    model, losses = _small()
    collector = GradientMetricCollector(ours.PNorm(model, p=2))
    clean = collector(losses())
    weights = torch.ones(8, dtype=torch.float64)
    weights[3] = torch.nan
    found = collector(losses() * weights)
    assert bool(found[3].isnan())
    torch.testing.assert_close(found[weights == 1], clean[weights == 1])


class Leaking(nn.Module):
    """A model whose losses may use an activation that it does not return."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        self.activation = self.first(x).tanh()
        return self.second(self.activation)


def test_losses_that_use_more_than_the_output_take_the_loop():
    model, x = Leaking().double(), torch.randn(6, 4, dtype=torch.float64)
    collector, reference = _norms(GradientMetricCollector, ours, model), _norms(Theirs, theirs, model)

    def losses():
        return _loss(model, x) + model.activation.square().sum(1).flip(0)

    expected = reference(losses())
    with pytest.warns(UserWarning, match="more of the watched module than its outputs"):
        found = collector(losses())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, check_dtype=False)


class Coupled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        y = self.layer(x)
        return y - y.mean(0)


def test_samples_that_depend_on_each_other_take_the_loop():
    model, x = Coupled().double(), torch.randn(6, 4, dtype=torch.float64)
    collector, reference = _norms(GradientMetricCollector, ours, model), _norms(Theirs, theirs, model)
    expected = reference(_loss(model, x))
    with pytest.warns(UserWarning, match="the samples of a batch depend on each other"):
        found = collector(_loss(model, x))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, check_dtype=False)


class Experts(nn.Module):
    """Each sample goes to one of two experts."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def forward(self, x):
        out, chosen = x.new_zeros(len(x), 3), (x[:, 0] > 0).long()
        for number, expert in enumerate(self.experts):
            out[chosen == number] = expert(x[chosen == number])
        return out


class Sorted(nn.Module):
    """Sorts the samples inside, and restores their order."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.layer(x[order])[order.argsort()]


class Switched(nn.Module):
    """A flag decides which of two axes of equal length is the sample axis."""

    def __init__(self):
        super().__init__()
        self.swapped, self.layer = False, nn.Linear(2, 3)

    def forward(self, x):
        x = x.view(len(x), 2, 2)
        return (
            self.layer(x.transpose(0, 1).flatten(0, 1) if self.swapped else x.flatten(0, 1))
            .view(*((2, -1) if self.swapped else (-1, 2)), 3)
            .sum(0 if self.swapped else 1)
        )


@pytest.mark.parametrize("kind", [Experts, Sorted, Switched])
def test_layouts_that_change_between_batches(kind):
    model = kind().double()
    collector, reference = _norms(GradientMetricCollector, ours, model), _norms(Theirs, theirs, model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "gradient metrics take one backward pass per loss")
        for number in range(6):
            x = torch.randn(4, 4, dtype=torch.float64).abs() * (torch.arange(4)[:, None] >= number - 1).double().mul(
                2
            ).sub(1)
            model.swapped = number > 2
            expected = reference(_loss(model, x))
            torch.testing.assert_close(collector(_loss(model, x)), expected, rtol=1e-6, atol=1e-9, check_dtype=False)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls, self.seen, self.layer = 0, [], nn.Linear(4, 3)

    def forward(self, x):
        self.calls += 1
        self.seen.append(len(x))
        return self.layer(x)


def test_trial_runs_do_not_change_counters_and_lists():
    model, x = Counting(), torch.randn(6, 4)
    collector = GradientMetricCollector(ours.Max(model))
    plans = []
    for number in range(1, 4):
        collector(_loss(model, x))
        assert (model.calls, model.seen) == (number, [6] * number)
        plans.append(len(watching._plans[model]))
    assert plans == [1, 1, 1]


# -- results, buffers, transforms ---------------------------------------------------------------------------------------


def test_results_carry_no_graph():
    model, losses = _small()
    collector = _norms(GradientMetricCollector, ours, model)
    results = [collector(losses()), collector(losses())]
    del collector
    with pytest.warns(UserWarning, match="not watched"):
        results.append(GradientMetricCollector(ours.Max(model[0].weight))(losses()))
    for result in results:
        assert not result.requires_grad
        result.numpy()


@pytest.mark.parametrize("training", [False, True])
def test_statistics_of_batch_norm_come_from_the_users_passes_only(training):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).train(training)
    alone, x = copy.deepcopy(model), torch.randn(8, 4)
    collector = GradientMetricCollector(ours.Max(model))
    with pytest.warns(UserWarning, match="depend on each other") if training else nullcontext():
        for _ in range(3):
            collector(_loss(model, x))
            _loss(alone, x)
    for one, other in zip(model.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_building_a_plan_leaves_a_pending_graph_valid():
    """Batch norm's backward pass needs the buffers of the same forward pass."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).eval()
    pending = model(torch.randn(8, 4)).sum()
    collector = GradientMetricCollector(ours.Max(model))
    collector(_loss(model, torch.randn(8, 4)))
    pending.backward()


@pytest.mark.parametrize("transform", [lambda g: (g > 0).long(), lambda g: g > 0, lambda g: (g > 0).to(torch.uint8)])
def test_transforms_to_integers(transform):
    model, losses = _small()

    def metrics(kind, change):
        return [
            kind.PNorm(model, change, 2),
            kind.MeanStd(model, change),
            kind.Max(model, change),
            kind.Min(model, change),
        ]

    expected = Theirs(metrics(theirs, lambda g: transform(g).float()))(losses())
    found = GradientMetricCollector(metrics(ours, transform))(losses())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_complex_gradients_are_refused_in_one_sentence():
    weight = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    loss = (weight * torch.ones(2, 3)).sum(1).abs()
    with (
        pytest.warns(UserWarning, match="not a parameter|not watched"),
        pytest.raises(ValueError, match="Max is not defined for complex gradients"),
    ):
        GradientMetricCollector(ours.Max(weight))(loss)


# -- fast again ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", fast_rows(["same", "nested", "disjoint", "nested the other way"], ["nested"]))
def test_two_collectors_on_one_model(targets):
    model, losses = _small()
    first, second = {
        "same": (model, model),
        "nested": (model, model[0]),
        "disjoint": (model[0], model[2]),
        "nested the other way": (model[2], model),
    }[targets]
    one, other = _norms(GradientMetricCollector, ours, first), _norms(GradientMetricCollector, ours, second)
    expected = _norms(Theirs, theirs, first)(losses()), _norms(Theirs, theirs, second)(losses())
    for _ in range(2):
        loss = losses()
        torch.testing.assert_close(one(loss, retain_graph=True), expected[0], rtol=1e-6, atol=1e-9, check_dtype=False)
        torch.testing.assert_close(other(loss), expected[1], rtol=1e-6, atol=1e-9, check_dtype=False)
    del one
    gc.collect()
    torch.testing.assert_close(other(losses()), expected[1], rtol=1e-6, atol=1e-9, check_dtype=False)


INTERRUPTIONS = {
    "a transform": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "vmap": lambda model, x: torch.func.vmap(model)(x[:, None]),
    "flops": lambda model, x: _counted_flops(model, x),
    "an error": lambda model, x: _raised(model, x[:, :2]),
    "train mode": lambda model, x: (model.train()(x), model.eval()),
    "no gradients": lambda model, x: _without_gradients(model, x),
    "an empty batch": lambda model, x: model(x[:0]),
    "one sample": lambda model, x: model(x[:1]),
}


def _counted_flops(model, x):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        model(x)


def _raised(model, x):
    with pytest.raises(RuntimeError):
        model(x)


def _without_gradients(model, x):
    with torch.inference_mode():
        model(x)


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_an_unusual_call_does_not_slow_the_next_ones(name):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double().eval()
    x = torch.randn(8, 4, dtype=torch.float64)
    collector = _norms(GradientMetricCollector, ours, model)
    INTERRUPTIONS[name](model, x)
    expected = _norms(Theirs, theirs, model)(_loss(model, x))
    for _ in range(2):  # a warning would be an error
        torch.testing.assert_close(collector(_loss(model, x)), expected, rtol=1e-6, atol=1e-9, check_dtype=False)


def test_losses_of_an_unwatched_pass_do_not_slow_the_next_ones():
    model, losses = _small()
    early = losses()
    collector = _norms(GradientMetricCollector, ours, model)
    with pytest.warns(UserWarning, match="was not watched"):
        expected = collector(early)
    for _ in range(2):
        torch.testing.assert_close(collector(losses()), expected, rtol=1e-6, atol=1e-9)


def test_autocast_around_the_forward_pass_only():
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    model, x = nn.Sequential(*layers, nn.Linear(8, 3)), torch.randn(8, 3, 8, 8)
    collector = GradientMetricCollector([ours.PNorm(model, p=1), ours.PNorm(model, p=2)])
    reference = Theirs([theirs.PNorm(model, p=1), theirs.PNorm(model, p=2)])
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss, other = _loss(model, x), _loss(model, x)
        torch.testing.assert_close(collector(loss), reference(other), rtol=5e-2, atol=0)
