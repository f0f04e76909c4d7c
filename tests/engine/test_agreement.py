"""Moments of a gradient are compared with those of another computation."""

from __future__ import annotations

import torch

from lightning_gradmetrics.engine.agreement import BLOCK, agreeing
from lightning_gradmetrics.gradients.statistics import gradient_moments


def test_a_large_transposed_gradient_agrees_with_itself_but_not_with_one_wrong_entry() -> None:
    """It is compared in blocks, and in the order of its memory."""
    torch.manual_seed(0)
    gradient = torch.randn(500, BLOCK // 400).T
    for place in (0, -1):
        for key in ("max", "min", "sum", 1.0, 2.0):
            moments = {key: gradient_moments(gradient[None], [key])[key][None]}
            wrong = gradient.clone()
            wrong[place, place] = -1e3 if key == "min" else 1e3
            assert agreeing(moments, [gradient], [0.0]).tolist() == [True]
            assert agreeing(moments, [wrong], [0.0]).tolist() == [False]
