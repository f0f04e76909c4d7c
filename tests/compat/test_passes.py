"""Which forward and backward passes the collector records, and what it leaves unchanged."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_gradmetrics as lgm
from lightning_gradmetrics.compat.gradient_metrics import metrics as ours
from lightning_gradmetrics.compat.gradient_metrics import watching
from lightning_gradmetrics.compat.gradient_metrics.collector import GradientMetricCollector
from lightning_gradmetrics.compat.gradient_metrics.listener import HEARD
from tests.classifier.test_tensor_records import WAYS
from tests.classifier.test_tensor_records import made as rescaling
from tests.classifier.test_tensor_records import norms as norms_alone
from tests.compat.collectors import Theirs, build, layers_of, losses_of, norms, small, theirs
from tests.engine.cases import made
from tests.models import fast_rows


@pytest.mark.parametrize("frozen", [(0,), (2,), (0, 2)])
def test_frozen_layers_have_the_same_metrics(frozen):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    expected = build(theirs, Theirs, model, layers_of(model))(losses_of(model, x))
    for index in frozen:
        model[index].requires_grad_(False)
    found = build(ours, GradientMetricCollector, model, layers_of(model))(losses_of(model, x))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8, check_dtype=False)
    assert [p.requires_grad for p in model.parameters()] == [i not in frozen for i in (0, 0, 2, 2)]


class Pausing(nn.Module):
    """Uses a layer without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.body(x)
        return self.head(self.stem(x) * scale)


def test_gradients_of_the_user_stay_where_a_layer_is_used_without_gradients() -> None:
    model, x = Pausing().double(), torch.randn(5, 4, dtype=torch.float64)
    collector = GradientMetricCollector(ours.PNorm(model, p=2))
    expected = lgm.gradient_statistics(model, x, "pseudo_label", engine="reference").norm(2)
    for _ in range(3):
        torch.testing.assert_close(collector(losses_of(model, x))[:, 0], expected, check_dtype=False)
        assert all(parameter.grad is None for parameter in model.parameters())


def test_a_layer_that_is_first_planned_inside_a_checkpoint_leaves_it_valid() -> None:
    layer, head, x = nn.Linear(4, 4), nn.Linear(4, 3), torch.randn(5, 4, requires_grad=True)
    collector = GradientMetricCollector(ours.PNorm(layer, p=2))
    losses = losses_of(lambda batch: head(checkpoint(layer, batch, use_reentrant=False).tanh()), x)
    losses.sum().backward(retain_graph=True)
    assert collector(losses).shape == (5, 1) and layer.weight.grad is not None


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


def test_unused_parameters_have_zero_gradients():
    model, x = Unused(), torch.randn(5, 4)
    collector = GradientMetricCollector([ours.Mean(model), ours.Max(model.unused), ours.Max(model, torch.abs)])
    found = collector(losses_of(model, x))
    part = Theirs([theirs.Mean(model.used), theirs.Max(model.used, torch.abs)])(losses_of(model, x))
    torch.testing.assert_close(found, torch.stack([part[:, 0] * 15 / 21, torch.zeros(5), part[:, 1]], 1))


@pytest.mark.slow
def test_retain_graph_and_the_users_own_backward():
    model, x = made("convolutional")
    collector = GradientMetricCollector(ours.PNorm(model))
    loss = losses_of(model, x)
    first, second = collector(loss, retain_graph=True), collector(loss, retain_graph=True)
    torch.testing.assert_close(first, second)
    assert all(p.grad is None for p in model.parameters())
    loss.mean().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    del collector
    gc.collect()
    losses_of(model, x).mean().backward()
    for one, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)


def test_without_retain_graph_the_graph_is_freed():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)
    collector = GradientMetricCollector(ours.PNorm(model))
    collector(losses_of(model, x))
    loss = losses_of(model, x)
    collector(loss)
    with pytest.raises(RuntimeError, match="second time"):
        loss.sum().backward()


def test_several_forward_passes():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(2, 6, 4, dtype=torch.float64)
    collector = build(ours, GradientMetricCollector, model, layers_of(model))
    reference = build(theirs, Theirs, model, layers_of(model))
    kept = losses_of(model, y)
    first, second = losses_of(model, x), losses_of(model, y)
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
    early = losses_of(model, x) if target == "before" else None
    collector = GradientMetricCollector([ours.Max(layers), ours.PNorm(layers)])
    reference = Theirs([theirs.Max(layers), theirs.PNorm(layers)])
    if target == "second_axis":
        loss = model(x)[:, :, 0].square().mean(0)  # three "samples" that are columns, not rows
    else:
        loss = losses_of(model, x) if early is None else early
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
    loss = losses_of(model, x)
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
    loss = losses_of(model, torch.randn(5, 4))
    expected = Theirs(theirs.Max(model))(losses_of(model, torch.zeros(5, 4)) + loss, retain_graph=True)
    assert collector(loss).shape == expected.shape


@pytest.mark.slow
def test_activations_are_not_kept():
    model = nn.Sequential(nn.Linear(4, 3))
    collector = GradientMetricCollector(ours.Max(model))
    loss = losses_of(model, torch.randn(5, 4))
    gc.collect()
    assert len(HEARD) == 1
    collector(loss, retain_graph=True)
    del loss
    gc.collect()
    assert len(HEARD) == 0


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
        collector(losses_of(model, x))
        assert (model.calls, model.seen) == (number, [6] * number)
        plans.append(len(watching._plans[model]))
    assert plans == [1, 1, 1]


def test_results_carry_no_graph():
    model, losses = small()
    collector = norms(GradientMetricCollector, ours, model)
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
            collector(losses_of(model, x))
            losses_of(alone, x)
    for one, other in zip(model.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_building_a_plan_leaves_a_pending_graph_valid():
    """Batch norm's backward pass needs the buffers of the same forward pass."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).eval()
    pending = model(torch.randn(8, 4)).sum()
    collector = GradientMetricCollector(ours.Max(model))
    collector(losses_of(model, torch.randn(8, 4)))
    pending.backward()


@pytest.mark.parametrize("targets", fast_rows(["same", "nested", "disjoint", "nested the other way"], ["nested"]))
def test_two_collectors_on_one_model(targets):
    model, losses = small()
    first, second = {
        "same": (model, model),
        "nested": (model, model[0]),
        "disjoint": (model[0], model[2]),
        "nested the other way": (model[2], model),
    }[targets]
    one, other = norms(GradientMetricCollector, ours, first), norms(GradientMetricCollector, ours, second)
    expected = norms(Theirs, theirs, first)(losses()), norms(Theirs, theirs, second)(losses())
    for _ in range(2):
        loss = losses()
        torch.testing.assert_close(one(loss, retain_graph=True), expected[0], rtol=1e-6, atol=1e-9, check_dtype=False)
        torch.testing.assert_close(other(loss), expected[1], rtol=1e-6, atol=1e-9, check_dtype=False)
    del one
    gc.collect()
    torch.testing.assert_close(other(losses()), expected[1], rtol=1e-6, atol=1e-9, check_dtype=False)


COMPILED: dict[str, Callable[[nn.Sequential], Any]] = {
    "a layer": lambda model: model[0].compile(backend="eager"),
    "a function": lambda model: setattr(model[0], "forward", torch.compile(model[0].forward, backend="eager")),
}


@pytest.mark.parametrize("kind", COMPILED)
def test_layers_that_are_compiled_after_they_were_planned_take_one_pass_per_loss(kind: str) -> None:
    """The calls inside are hidden: the gradients of their parameters were taken for zero."""
    model, losses = small()
    collector = norms(GradientMetricCollector, ours, model)
    expected = collector(losses())
    COMPILED[kind](model)
    with pytest.warns(UserWarning, match="the calls inside a compiled module or function are hidden"):
        torch.testing.assert_close(collector(losses()), expected)
    torch.testing.assert_close(collector(losses()), expected)
    torch._dynamo.reset()


def test_parameters_that_were_replaced_are_refused() -> None:
    model, losses = small()
    collector = norms(GradientMetricCollector, ours, model)
    collector(losses())
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match=r"were replaced after it was made.*make new metrics and a new collector"):
        collector(losses())


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
            loss, other = losses_of(model, x), losses_of(model, x)
        torch.testing.assert_close(collector(loss), reference(other), rtol=5e-2, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_trial_runs_do_not_change_the_weights(way):
    model, x = rescaling(way)
    plain, expected = copy.deepcopy(model), norms_alone(model, x)
    logits_of_plain = plain(x)
    collector = GradientMetricCollector(ours.PNorm(model, p=2))
    logits = model(x)
    found = collector(nn.functional.cross_entropy(logits, logits.argmax(1), reduction="none"))
    torch.testing.assert_close(logits, logits_of_plain)
    torch.testing.assert_close(found[:, 0], expected, check_dtype=False)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
