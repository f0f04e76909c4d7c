"""The collector and its metrics, side by side with the package gradient_metrics, and where that package fails."""

from __future__ import annotations

import copy
import gc
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradmetrics.compat.gradient_metrics import metrics as ours
from lightning_gradmetrics.compat.gradient_metrics.collector import GradientMetricCollector
from tests.engine.cases import made

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
def test_a_metric_on_its_own(grad):
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


def test_inference_mode_says_what_to_do():
    model = nn.Linear(3, 2)
    collector = GradientMetricCollector(ours.Max(model))
    with torch.inference_mode():
        loss = _loss(model, torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"inference_mode\(False\).*gradient_statistics"):
        collector(loss)


def test_one_backward_for_the_whole_batch():
    model, x = made("convolutional")
    collector, passes = GradientMetricCollector([ours.Max(model), ours.PNorm(model, lambda g: g)]), []
    collector(_loss(model, x))
    logits = model(x)
    logits.register_hook(lambda g: passes.append(g))
    collector(F.cross_entropy(logits, logits.argmax(1), reduction="none"))
    assert len(passes) == 1


def test_channels_last():
    model, x = made("channels_last")
    plain, _ = made("convolutional")
    plain.load_state_dict(model.state_dict())
    collector = _build(ours, GradientMetricCollector, model, _layers(model))
    expected = _build(theirs, Theirs, plain, _layers(plain))(_loss(plain, x.contiguous()))
    torch.testing.assert_close(collector(_loss(model, x)), expected, rtol=1e-5, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("frozen", [(0,), (2,), (0, 2)])
def test_frozen_layers_count_as_if_they_were_not(frozen):
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
    again = _loss(model, x)
    spent = GradientMetricCollector(ours.PNorm(model))
    spent(_loss(model, x))
    again = _loss(model, x)
    spent(again)
    with pytest.raises(RuntimeError, match="second time"):
        spent(again)


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
def test_what_is_not_seen_takes_the_loop(target):
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
    with pytest.warns(UserWarning, match="one backward pass a sample"):
        found = collector(loss)
    torch.testing.assert_close(found, expected, check_dtype=False)


def test_nothing_is_left_on_the_model():
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


def test_an_error_in_the_forward_pass_ends_the_watch_of_it():
    model = nn.Sequential(nn.Linear(4, 3))
    collector = GradientMetricCollector(ours.Max(model))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(5, 4))
        model(torch.randn(5, 7))
    loss = _loss(model, torch.randn(5, 4))
    expected = Theirs(theirs.Max(model))(_loss(model, torch.zeros(5, 4)) + loss, retain_graph=True)
    assert collector(loss).shape == expected.shape


def test_activations_are_not_kept():
    model = nn.Sequential(nn.Linear(4, 3))
    collector = GradientMetricCollector(ours.Max(model))
    loss = _loss(model, torch.randn(5, 4))
    assert len(collector._recording._listeners) == 1
    del loss
    gc.collect()
    assert len(collector._recording._listeners) == 0


def test_an_empty_batch():
    model = nn.Linear(4, 3)
    collector = GradientMetricCollector([ours.Max(model), ours.MeanStd(model)])
    assert collector(_loss(model, torch.randn(0, 4))).shape == (0, 3)
