"""The garbage collector is paused while a model is planned."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from lightning_gradmetrics.engine import gradient_statistics


def test_the_collector_is_paused_in_the_first_call_only() -> None:
    enabled: list[bool] = []

    def objective(logits: Tensor) -> Tensor:
        enabled.append(gc.isenabled())
        return logits.square().sum(1)

    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    gradient_statistics(model, x, objective)
    assert not any(enabled) and gc.isenabled()
    enabled.clear()
    gradient_statistics(model, x, objective)
    assert all(enabled)


def test_the_collector_runs_again_after_an_error() -> None:
    def objective(logits: Tensor) -> Tensor:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        gradient_statistics(nn.Linear(4, 3), torch.randn(5, 4), objective)
    assert gc.isenabled()


def test_a_collector_that_the_caller_has_paused_stays_paused() -> None:
    gc.disable()
    try:
        gradient_statistics(nn.Linear(4, 3), torch.randn(5, 4), "pseudo_label")
        assert not gc.isenabled()
    finally:
        gc.enable()
