"""Models that draw random numbers in eval mode: exact for the draw of the batch, the same in every call with one seed, or refused."""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.engine.refusals import CoupledSamplesError, NotReproducibleError
from tests.engine.kinds import WIDTH, Net, numbers

SIZES = (3, 5, 1, 8, 8, 6, 4)


class _Hidden(torch.autograd.Function):
    """A product with a parameter that the engine does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ x


def _dropped(h: Tensor) -> Tensor:
    return F.dropout(h, 0.5, training=True)


def _stochastic_depth(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.a(x))
    kept = torch.rand(len(x), 1) < 0.5
    return net.head(h + torch.tanh(net.b(h)) * kept)


def _shuffled(net: Any, x: Tensor) -> Tensor:
    order = torch.randperm(len(x))
    return net.head(_dropped(torch.tanh(net.a(x[order]))))[order.argsort()]


def _routed(net: Any, x: Tensor) -> Tensor:
    rows = (torch.rand(len(x)) < 0.5).nonzero()[:, 0]
    routed = torch.zeros_like(x).index_add(0, rows, torch.tanh(net.a(x[rows])))
    return net.head(routed + torch.tanh(net.b(x)))


EXACT = {
    "dropout": lambda net, x: net.head(_dropped(torch.tanh(net.b(_dropped(torch.tanh(net.a(x))))))),
    "noise": lambda net, x: net.head(torch.tanh(net.a(x)) + torch.randn(x.shape, dtype=x.dtype)),
    "noise that the samples share": lambda net, x: net.head(torch.tanh(net.a(x)) * torch.randn(WIDTH, dtype=x.dtype)),
    "stochastic depth": _stochastic_depth,
    "a path chosen by a coin": lambda net, x: net.head(torch.tanh(net.a(x) if torch.rand(()) < 0.5 else net.b(x))),
    "a random order": _shuffled,
    "random experts": _routed,
    "a custom function between two masks": lambda net, x: net.head(
        _dropped(torch.tanh(_Hidden.apply(_dropped(torch.tanh(net.b(x))), net.a.weight)))
    ),
}


def _truth(model: nn.Module, x: Tensor, seed: int) -> Tensor:
    """The norms ``(N, P)`` of each sample's gradients in one forward pass of the batch."""
    torch.manual_seed(seed)
    trained = copy.deepcopy(model)
    parameters, logits = list(trained.parameters()), trained(x)
    losses = F.cross_entropy(logits, logits.detach().argmax(1), reduction="none")
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        rows.append(torch.stack([loss.new_zeros(()) if g is None else g.norm() for g in gradients]))
    return torch.stack(rows)


@pytest.mark.filterwarnings("ignore:no fast rule", "ignore:Net draws random numbers")
@pytest.mark.parametrize("name", EXACT)
def test_gradients_are_those_of_the_batchs_own_draw_in_first_and_later_calls(name: str) -> None:
    torch.manual_seed(0)
    model = Net(EXACT[name]).double().eval()
    for number, size in enumerate(SIZES):
        x = numbers(size, WIDTH)
        expected = _truth(model, x, number)
        for _ in range(2):
            torch.manual_seed(number)
            found = gradient_statistics(model, x, "pseudo_label", per_parameter=True).norm(2)
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


def _decided_by_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.head(_dropped(torch.tanh(net.a(x))) * (2 if x.max() < 1.5 else 1))


def _read_by_python(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.a(x))
    return net.head(_dropped(h) * (1 + float(h.max())))


COUPLED = {
    "centred": lambda net, x: net.head(_dropped(torch.tanh(net.a(x)) - torch.tanh(net.a(x)).mean(0))),
    "rows of other samples": lambda net, x: net.head(torch.tanh(net.a(x)) + net.b(x)[torch.randperm(len(x))]),
    "the largest value decides": _decided_by_the_batch,
    "Python reads the largest activation": _read_by_python,
}


@pytest.mark.filterwarnings("ignore:Net draws random numbers")
@pytest.mark.parametrize("name", COUPLED)
def test_random_models_that_couple_the_samples_are_refused(name: str) -> None:
    torch.manual_seed(0)
    model = Net(COUPLED[name]).double().eval()
    with pytest.raises(CoupledSamplesError, match="depend on each other"):
        for size in (4, 8, 8, 8):
            gradient_statistics(model, numbers(size, WIDTH), "pseudo_label")


SOURCES = {
    "numpy": lambda net, x: net.head(torch.tanh(net.a(x)) * np.random.rand()),  # noqa: NPY002
    "random": lambda net, x: net.head(torch.tanh(net.a(x)) * random.random()),
    "a separate generator": lambda net, x: net.head(torch.tanh(net.a(x)) * torch.rand((), generator=net.generator)),
}


@pytest.mark.parametrize("engine", ["auto", "vmap", "reference"])
@pytest.mark.parametrize("name", SOURCES)
def test_random_numbers_that_cannot_be_repeated_are_refused(name: str, engine: str) -> None:
    model = Net(SOURCES[name]).double().eval()
    model.generator = torch.Generator()
    with pytest.raises(NotReproducibleError, match="torch's default generators"):
        gradient_statistics(model, numbers(4, WIDTH), "pseudo_label", engine=engine)


BRANCHES = {
    "numpy": lambda net: np.random.rand(),  # noqa: NPY002
    "random": lambda net: random.random(),
    "a separate generator": lambda net: net.generator.random(),
}


@pytest.mark.filterwarnings("ignore:no fast rule")
@pytest.mark.parametrize("engine", ["auto", "vmap", "reference"])
@pytest.mark.parametrize("name", BRANCHES)
def test_branches_that_a_number_chooses_are_refused_whichever_is_drawn(name: str, engine: str) -> None:
    """A few passes often take the same branch."""
    draw = BRANCHES[name]
    for seed in range(4):
        model = Net(lambda net, x: net.head(torch.tanh(net.a(x)) * (2 if draw(net) < 0.5 else 1))).double().eval()
        model.generator = np.random.default_rng(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        with pytest.raises(NotReproducibleError, match="torch's default generators"):
            gradient_statistics(model, numbers(4, WIDTH), "pseudo_label", engine=engine)


@pytest.mark.parametrize("engine", ["auto", "vmap", "reference"])
@pytest.mark.parametrize("name", BRANCHES)
def test_numbers_without_an_effect_are_reported_once(name: str, engine: str) -> None:
    """Some models draw for each layer whether to drop it, and use the number in training only."""
    draw = BRANCHES[name]
    model = Net(lambda net, x: net.head(torch.tanh(net.a(x)) * (2 if draw(net) < 0 else 1))).double().eval()
    model.generator, x = np.random.default_rng(0), numbers(6, WIDTH)
    with pytest.warns(UserWarning, match="random numbers were drawn from .* in a forward pass of Net"):
        found = gradient_statistics(model, x, "pseudo_label", engine=engine)
    again = gradient_statistics(model, x, "pseudo_label", engine=engine)
    torch.testing.assert_close(again.moments, found.moments)


def test_a_state_out_of_sight_that_few_passes_do_not_change_is_found_when_gradients_disagree() -> None:
    factors = itertools.cycle([1.0, 1.0, 2.0])
    model = Net(lambda net, x: net.head(torch.tanh(net.a(x)) * next(factors))).double().eval()
    for _ in range(3):
        with pytest.raises(NotReproducibleError, match="torch's default generators"):
            gradient_statistics(model, numbers(5, WIDTH), "pseudo_label")


def test_a_count_of_passes_that_changes_one_sample_alone_is_found_by_the_reference() -> None:
    factors = itertools.chain([1.0] * 5, [2.0], itertools.repeat(1.0))
    model = Net(lambda net, x: net.head(torch.tanh(net.a(x)) * next(factors))).double().eval()
    with pytest.raises(NotReproducibleError, match="torch's default generators"):
        gradient_statistics(model, numbers(5, WIDTH), "pseudo_label", engine="reference")


def test_one_warning_says_that_the_gradients_are_those_of_one_draw() -> None:
    model = Net(EXACT["dropout"]).double().eval()
    with warnings.catch_warnings(record=True) as issued:
        warnings.simplefilter("always")
        for size in (4, 4, 7):
            gradient_statistics(model, numbers(size, WIDTH), "pseudo_label")
    (warning,) = issued
    assert "Net draws random numbers in its forward pass" in str(warning.message)
