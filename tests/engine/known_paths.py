"""Models with known paths, and what later batches of them must return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lightning_gradmetrics as lgm
from lightning_gradmetrics.engine.auto import _STRATEGIES

CHANGED: dict[str, Any] = {"on": False}
"""State that is not part of any model, so that no key of a strategy shows its changes."""


def is_on() -> bool:
    return bool(CHANGED["on"])


def paths_of(model: nn.Module) -> list[Any]:
    """Return the known paths of a model."""
    found: list[Any] = []
    for strategies in _STRATEGIES[model].values():
        for known in strategies:
            found += known.paths.values()
    return found


def batch() -> Tensor:
    tokens = torch.randint(30, (5, 3))
    tokens[:, 2] = tokens[:, 0]  # a row that is looked up twice
    return tokens


def require_equal(model: nn.Module, tokens: Tensor) -> None:
    """Require the statistics of the slow engine, for two objectives."""
    objectives = ["pseudo_label", "uniform"]
    results = lgm.gradient_statistics(model, tokens, objectives, per_parameter=True)
    expected = lgm.gradient_statistics(model, tokens, objectives, per_parameter=True, engine="reference")
    for one, other in zip(results, expected, strict=True):
        for key, value in other.moments.items():
            torch.testing.assert_close(one.moments[key], value, rtol=1e-9, atol=1e-12)


class InOrder(nn.Module):
    """Calls its layers in their order; ``end`` changes the logits."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.end = nn.Linear(6, 6), nn.Linear(6, 6), end

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x).tanh()
        return self.end(x)


def require_known_path(model: nn.Module) -> None:
    """Run four right batches of five samples, after which a path is known."""
    for _ in range(4):
        require_equal(model, torch.randn(5, 6, dtype=torch.float64))
    assert any(path is not None for path in paths_of(model)), "no path is known"
