"""Models that call ``squeeze()`` without an axis, which removes the sample axis of one sample alone too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_gradmetrics.engine import auto, gradient_statistics
from lightning_gradmetrics.engine.planning.verification import make_strategy
from lightning_gradmetrics.engine.refusals import CoupledSamplesError
from tests.engine.kinds import WIDTH, Net, error_of, numbers


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
