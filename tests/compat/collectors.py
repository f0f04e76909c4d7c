"""Collectors of both packages, and models, that the tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

theirs = pytest.importorskip("gradient_metrics.metrics")
Theirs = pytest.importorskip("gradient_metrics").GradientMetricCollector


def _count_large(kind: Any) -> Any:
    base: Any = kind.GradientMetric

    class CountLarge(base):  # type: ignore[misc]
        """A user's metric."""

        buffer: Tensor

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.reset()

        def _collect(self, grad: Tensor) -> None:
            self.buffer = self.buffer + (grad.abs() > 1e-2).sum()

        def _get_metric(self) -> Tensor:
            return self.buffer

        def reset(self) -> None:
            self.buffer = torch.tensor(0.0)

    return CountLarge


def build(kind: Any, collector: Any, model: nn.Module, layers: list[nn.Module]) -> Any:
    return collector(
        [
            kind.Max(model),
            kind.Min(model),
            kind.Mean(layers),
            kind.MeanStd(model),
            kind.MeanStd(layers[0], return_mean=False, eps=1e-3),
            kind.PNorm(model),
            kind.PNorm(layers, p="inf"),
            kind.PNorm(layers[-1], p=0.5),
            kind.Max(model, grad_transform=lambda g: g.abs().sqrt()),
            kind.PNorm(model, lambda g: g * 2, 2),
            _count_large(kind)(model),
        ]
    )


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [child for child in model.children() if any(True for _ in child.parameters())]


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(x)
    return F.cross_entropy(logits, logits.argmax(1), reduction="none")


def small() -> tuple[nn.Module, Callable[..., Tensor]]:
    """Return a model and a function that computes the losses of some rows of its batch."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
    return model, lambda rows=slice(None): F.cross_entropy(model(x[rows]), y[rows], reduction="none")


def norms(collector_class: Any, kind: Any, model: nn.Module) -> Any:
    return collector_class([kind.Max(model), kind.MeanStd(model), kind.PNorm(model, p=2), kind.PNorm(model, abs, 1)])
