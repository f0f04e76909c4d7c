"""Statistics of gradients that are given as tensors."""

from __future__ import annotations

import torch

from lightning_gradmetrics.gradients.statistics import GradientStatistics


def test_std_of_large_entries() -> None:
    """It is right if only the square of the sum overflows, and infinite if the sum of squares does."""
    entries = torch.full((1, 400), 1e152, dtype=torch.float64)
    entries[0, :200] *= 3
    statistics = GradientStatistics.of({"weight": entries})
    torch.testing.assert_close(statistics.std, entries.std(1))
    assert GradientStatistics.of({"weight": 1e5 * entries}).std.tolist() == [torch.inf]
