"""Models that call ``squeeze()`` without an axis, which removes the sample axis of one sample alone too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gradmetrics.engine import auto, gradient_statistics
from lightning_gradmetrics.engine.planning.verification import make_strategy
from lightning_gradmetrics.engine.refusals import CoupledSamplesError, SampleAxisError
from tests.engine.kinds import WIDTH, Net, error_of, numbers

ENGINES: dict[str, dict[str, Any]] = {
    "auto": {},
    "compiled": {"compile": True},
    "vmap": {"engine": "vmap"},
    "reference": {"engine": "reference"},
}


class Pooled(nn.Module):
    """A convolution, a pooling and two layers; ``drop`` removes the two axes of the pooling."""

    def __init__(self, drop: Callable[[Tensor], Tensor], classes: int = 3) -> None:
        super().__init__()
        self.conv, self.pool, self.drop = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), drop
        self.rest = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.drop(self.pool(self.conv(x).relu())))


@pytest.mark.parametrize("classes", [3, 1])
@pytest.mark.parametrize("engine", ENGINES)
def test_statistics_of_batches_of_one_sample_are_those_of_a_model_that_keeps_its_axis(
    engine: str, classes: int
) -> None:
    torch.manual_seed(0)
    model = Pooled(torch.squeeze, classes).double().eval()
    kept = Pooled(lambda x: x.flatten(1), classes).double().eval()
    kept.load_state_dict(model.state_dict())
    objective = "confounding_logits" if classes == 1 else "pseudo_label"
    for size in (1, 5, 1, 5, 5, 1):
        x = numbers(size, 3, 6, 6)
        found = gradient_statistics(model, x, objective, per_parameter=True, **ENGINES[engine])
        expected = gradient_statistics(kept, x, objective, per_parameter=True, engine="reference")
        for order in (1, 2):
            torch.testing.assert_close(found.norm(order), expected.norm(order), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.max, expected.max, rtol=1e-9, atol=1e-12)


def test_batches_of_one_sample_keep_the_proof_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    monkeypatch.setattr(auto, "make_strategy", lambda *args: planned.append(make_strategy(*args)) or planned[-1])
    torch.manual_seed(0)
    model = Pooled(torch.squeeze).double().eval()
    for size in (5, 1, 8):
        assert error_of(model, numbers(size, 3, 6, 6), lambda z: -z.reshape(-1, 3).log_softmax(1).amax(1)) < 1e-8
    assert planned[0].sizes is not None and not planned[0].slow


def _several_rows(net: Any, x: Tensor) -> Tensor:
    """Three rows of one logit per sample, which look like three classes of one sample."""
    return net.head(torch.tanh(net.a(x))).flatten()


@pytest.mark.parametrize("engine", ENGINES)
def test_one_sample_with_several_rows_is_refused(engine: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(SampleAxisError):
        gradient_statistics(Net(_several_rows).double(), numbers(1, WIDTH), "pseudo_label", **ENGINES[engine])


def _centred(net: Any, x: Tensor) -> Tensor:
    """The average is over the features of one sample alone, and over the samples of a batch."""
    h = torch.tanh(net.a(x)).squeeze()
    return net.head(h - h.mean(0))


def test_one_sample_with_other_logits_than_two_copies_of_it_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(CoupledSamplesError):
        gradient_statistics(Net(_centred).double(), numbers(1, WIDTH), "pseudo_label")


def _weighted_by_start(net: Any, x: Tensor) -> Tensor:
    """The first entry of each sample is a number if the sample is alone, and weighs all steps of the sample."""
    start = x[:, :1, :1].squeeze()
    weights = torch.zeros_like(x[..., 0])
    weights[:] = 1.0
    weights[:, 0] = start
    return net.head((torch.tanh(net.a(x)) * weights[..., None]).mean(1))


def test_one_sample_with_fewer_axes_leaves_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the proof, one sample of every batch would run alone."""
    planned = []
    monkeypatch.setattr(auto, "make_strategy", lambda *args: planned.append(make_strategy(*args)) or planned[-1])
    torch.manual_seed(0)
    model = Net(_weighted_by_start).double()
    shapes = [(5, 4), (5, 4), (3, 6), (8, 4), (4, 9)]
    for shape in shapes:
        assert error_of(model, numbers(*shape, WIDTH)) < 1e-8
    (strategy,) = planned
    assert strategy.sizes is not None and strategy.turn == 0
    for values in strategy.times.values():
        assert all(is_covered for _, is_covered in values.values())
    assert error_of(model, numbers(1, 4, WIDTH)) < 1e-8


def _by_another_axis(net: Any, x: Tensor) -> Tensor:
    """The softmax is over the steps, but over the features for one sample alone; both have the same shapes."""
    h = torch.tanh(net.a(x)).reshape(len(x), 1, -1, WIDTH).squeeze()
    return net.head(h.softmax(1).reshape(len(x), -1, WIDTH).square().sum(1))


def test_one_sample_whose_missing_axis_changes_its_logits_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(CoupledSamplesError):
        gradient_statistics(Net(_by_another_axis).double(), numbers(8, WIDTH, WIDTH), "pseudo_label")


def _by_size(net: Any, x: Tensor) -> Tensor:
    """One sample alone makes another call, which may change its values."""
    h = torch.tanh(net.a(x)).squeeze()
    return net.head(h.clamp(-1, 1) if len(x) == 1 else h).reshape(len(x), -1)


def test_one_sample_that_makes_another_call_takes_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    monkeypatch.setattr(auto, "make_strategy", lambda *args: planned.append(make_strategy(*args)) or planned[-1])
    torch.manual_seed(0)
    assert error_of(Net(_by_size).double(), numbers(8, WIDTH)) < 1e-8
    assert len(planned) == 2 and planned[-1].sizes is None
