"""Losses of any number and order, and models and calls that need one backward pass per loss."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lightning_gradmetrics.compat.gradient_metrics import metrics as ours
from lightning_gradmetrics.compat.gradient_metrics.collector import GradientMetricCollector
from tests.compat.collectors import Theirs, losses_of, norms, small, theirs

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
    model, losses = small()
    collector, reference = norms(GradientMetricCollector, ours, model), norms(Theirs, theirs, model)
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
    first = collector(losses_of(model, x))
    torch.testing.assert_close(collector(losses_of(model, x)[order]), first[order])


def test_confident_samples_stay_fast():
    """The gradients of confident losses are small differences of numbers near one."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    collector = GradientMetricCollector(ours.PNorm(model, p=1))
    with torch.no_grad():
        model[2].weight *= 100
    x = torch.randn(64, 4)
    expected = Theirs(theirs.PNorm(model, p=1))(losses_of(model, x))
    torch.testing.assert_close(collector(losses_of(model, x)), expected, rtol=1e-4, atol=1e-12)


def test_a_loss_that_is_not_finite_does_not_affect_other_rows():
    model, losses = small()
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
    collector, reference = norms(GradientMetricCollector, ours, model), norms(Theirs, theirs, model)

    def losses():
        return losses_of(model, x) + model.activation.square().sum(1).flip(0)

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
    collector, reference = norms(GradientMetricCollector, ours, model), norms(Theirs, theirs, model)
    expected = reference(losses_of(model, x))
    with pytest.warns(UserWarning, match="the samples of a batch depend on each other"):
        found = collector(losses_of(model, x))
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
    collector, reference = norms(GradientMetricCollector, ours, model), norms(Theirs, theirs, model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "gradient metrics take one backward pass per loss")
        for number in range(6):
            x = torch.randn(4, 4, dtype=torch.float64).abs() * (torch.arange(4)[:, None] >= number - 1).double().mul(
                2
            ).sub(1)
            model.swapped = number > 2
            expected = reference(losses_of(model, x))
            torch.testing.assert_close(
                collector(losses_of(model, x)), expected, rtol=1e-6, atol=1e-9, check_dtype=False
            )


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
    collector = norms(GradientMetricCollector, ours, model)
    INTERRUPTIONS[name](model, x)
    expected = norms(Theirs, theirs, model)(losses_of(model, x))
    for _ in range(2):  # a warning would be an error
        torch.testing.assert_close(collector(losses_of(model, x)), expected, rtol=1e-6, atol=1e-9, check_dtype=False)


def test_losses_of_an_unwatched_pass_do_not_slow_the_next_ones():
    model, losses = small()
    early = losses()
    collector = norms(GradientMetricCollector, ours, model)
    with pytest.warns(UserWarning, match="was not watched"):
        expected = collector(early)
    for _ in range(2):
        torch.testing.assert_close(collector(losses()), expected, rtol=1e-6, atol=1e-9)


def test_a_scripted_target_takes_one_backward_pass_per_loss():
    layer = torch.jit.script(nn.Linear(4, 3).double())
    x = torch.randn(5, 4, dtype=torch.float64)
    collector, reference = norms(GradientMetricCollector, ours, layer), norms(Theirs, theirs, layer)
    with pytest.warns(UserWarning, match="inside a scripted module are hidden"):
        found = collector(losses_of(layer, x))
    torch.testing.assert_close(found, reference(losses_of(layer, x)), rtol=1e-6, atol=1e-9, check_dtype=False)


def test_losses_that_are_no_tensor_are_named() -> None:
    model = nn.Linear(3, 2)
    collector = GradientMetricCollector(ours.Max(model))
    losses = model(torch.randn(4, 3)).sum(1)
    with pytest.raises(TypeError, match=r"must be a tensor \(N,\).*got a list: join losses with torch\.stack"):
        collector(list(losses))
