"""Rounding may activate a ReLU in a batch but not for one sample alone; this must not discard the plan."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lightning_gradmetrics as lgm
from lightning_gradmetrics.engine import auto


class GateAtZero(nn.Module):
    """The last hidden unit is 0 up to rounding, which here depends on the size of the batch."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.hidden.weight[-1] = 0
            self.hidden.bias[-1] = 0
            self.head.weight[:, -1] = torch.tensor([weight, 0.0, 0.0])

    def forward(self, x: Tensor) -> Tensor:
        rounding = 1e-12 if len(x) > 2 else -1e-12
        logits: Tensor = self.head(torch.relu(self.hidden(x) + rounding))
        return logits


def test_a_relu_activated_by_rounding_keeps_the_plan() -> None:
    torch.manual_seed(0)
    model, x = GateAtZero(0.01), torch.randn(12, 6)
    lgm.gradient_statistics(model, x, "uniform", statistics=["l2"])
    assert not auto._UNPLANNABLE.get(model)


def test_a_relu_that_decides_the_gradient_is_not_rounding() -> None:
    torch.manual_seed(0)
    model, x = GateAtZero(100.0), torch.randn(12, 6)
    with pytest.warns(UserWarning, match="one sample at a time"):
        lgm.gradient_statistics(model, x, "uniform", statistics=["l2"])
    assert auto._UNPLANNABLE.get(model)
