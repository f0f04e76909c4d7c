"""Nothing that the engine or the collector stores grows with the number of batches, sizes and lengths of a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gradmetrics.compat.gradient_metrics import GradientMetricCollector, metrics, watching
from lightning_gradmetrics.engine import auto, gradient_statistics, planned_batch


class _Texts(nn.Module):
    """Classifies sequences of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)).mean(1))


def test_sizes_and_lengths_seen_by_the_engine_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned_batch, "MOST_BATCHES", 8)
    model = _Texts().double().eval()
    for length in range(2, 6):
        for size in (3, 4, 6):
            x = torch.randn(size, length, 4, dtype=torch.float64)
            found = gradient_statistics(model, x, "pseudo_label").norm(2)
    torch.testing.assert_close(found, gradient_statistics(model, x, "pseudo_label", engine="reference").norm(2))
    (strategies,) = auto._STRATEGIES[model].values()
    assert [len(strategy.times) for strategy in strategies] == [8]


def test_lengths_seen_by_the_collector_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "MOST_PLANS", 4)
    model = _Texts().double()
    collector = GradientMetricCollector([metrics.PNorm(model, p=2)])
    for length in range(2, 8):
        logits = model(torch.randn(4, length, 4, dtype=torch.float64))
        collector(torch.nn.functional.cross_entropy(logits, logits.argmax(1), reduction="none"))
    stored: list[Any] = [len(watching._plans[module]) for module in model.modules() if module in watching._plans]
    assert stored
    assert max(stored) <= 4


class _Link:
    """An entry of a linked list."""

    def __init__(self, following: Any) -> None:
        self.following, self.scale = following, 1.0


def test_a_long_linked_list_may_hang_on_a_module() -> None:
    model = _Texts().double().eval()
    first = None
    for _ in range(1500):
        first = _Link(first)
    model.first = first
    x = torch.randn(4, 3, 4, dtype=torch.float64)
    expected = gradient_statistics(model, x, "pseudo_label", engine="reference").norm(2)
    torch.testing.assert_close(gradient_statistics(model, x, "pseudo_label").norm(2), expected)
