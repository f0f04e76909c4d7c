"""The collector and its metrics, side by side with the package gradient_metrics, and where that package fails."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradmetrics.compat.gradient_metrics import metrics as ours
from lightning_gradmetrics.compat.gradient_metrics.collector import GradientMetricCollector
from tests.compat.collectors import Theirs, build, layers_of, losses_of, small, theirs
from tests.engine.cases import made


@pytest.mark.parametrize(
    "name", ["linear", "convolutional", "sequences", "frames", "lstm", "encoder", "tied", "checkpoint", "minor"]
)
def test_side_by_side(name):
    model, x = made(name)
    collector = build(ours, GradientMetricCollector, model, layers_of(model))
    for batch in (x, x[:3], x[:1]):
        expected = build(theirs, Theirs, model, layers_of(model))(losses_of(model, batch))
        found = collector(losses_of(model, batch))
        assert found.shape == expected.shape == (len(batch), collector.dim)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("grad", [torch.randn(3, 4), torch.tensor([2.5]), [torch.randn(2), torch.randn(3, 2)]])
def test_a_metric_without_a_collector(grad):
    layer = nn.Linear(2, 2)
    for one, other in zip(
        build(ours, GradientMetricCollector, layer, [layer])._metrics,
        build(theirs, Theirs, layer, [layer])._metrics,
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
    collector(losses_of(model, torch.randn(2, 3)))
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
        loss = losses_of(model, torch.randn(4, 3))
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
    collector = build(ours, GradientMetricCollector, model, layers_of(model))
    expected = build(theirs, Theirs, plain, layers_of(plain))(losses_of(plain, x.contiguous()))
    torch.testing.assert_close(collector(losses_of(model, x)), expected, rtol=1e-5, atol=1e-7, check_dtype=False)


def test_an_empty_batch():
    model = nn.Linear(4, 3)
    collector = GradientMetricCollector([ours.Max(model), ours.MeanStd(model)])
    assert collector(losses_of(model, torch.randn(0, 4))).shape == (0, 3)


@pytest.mark.parametrize("transform", [lambda g: (g > 0).long(), lambda g: g > 0, lambda g: (g > 0).to(torch.uint8)])
def test_transforms_to_integers(transform):
    model, losses = small()

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
