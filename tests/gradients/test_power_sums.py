"""Sums of powers of entries, also of entries below the smallest normal number."""

from __future__ import annotations

import pytest
import torch

from lightning_gradmetrics.gradients.powers import power_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_roots_of_the_smallest_numbers_are_exact(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    tiny, least = limits.tiny, limits.tiny * limits.eps
    entries = torch.tensor([[tiny / 8, 0, -tiny / 64], [least, 0, 0], [4, -9, 0], [tiny, 0, 0]], dtype=dtype)
    torch.testing.assert_close(power_sum(entries, 0.5), entries.abs().pow(0.5).sum(1), rtol=1e-6, atol=0)
    infinite = torch.tensor([[torch.nan, 0, 1], [torch.inf, 0, 1]], dtype=dtype)
    assert power_sum(infinite, 0.5).isnan().tolist() == [True, False]


@pytest.mark.parametrize("p", [3.0, 5.0, 6.0, 16.0, 17.0, 1.5])
def test_whole_powers_by_multiplication_are_those_of_pow(p: float) -> None:
    torch.manual_seed(0)
    entries = torch.randn(4, 7, 2, dtype=torch.float64)
    torch.testing.assert_close(power_sum(entries, p), entries.abs().pow(p).sum(1))
