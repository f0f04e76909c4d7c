"""Moments of a gradient are compared with those of another computation."""

from __future__ import annotations

import torch

from lightning_gradmetrics.engine.passes.agreement import BLOCK, SMALL, agreeing
from lightning_gradmetrics.gradients.statistics import gradient_moments, stacked_moments


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


def test_small_gradients_are_compared_together_and_each_wrong_one_is_found() -> None:
    torch.manual_seed(0)
    shapes = [(3, 4), (1,), (2, SMALL), (5, 7), (6,), (2, 3)]
    gradients = [torch.randn(shape) for shape in shapes]
    gradients[3], gradients[5] = gradients[3].double().T, gradients[5].double()
    keys = ["max", "min", "sum", 1.0, 2.0]
    expected = stacked_moments([gradient_moments(gradient[None], keys) for gradient in gradients])
    for wanted in (keys, [2.0], ["max", 3.0], ["sum"]):
        moments = stacked_moments([gradient_moments(gradient[None], wanted) for gradient in gradients])
        assert agreeing(moments, gradients, [0.0] * 6).all()
    for number in range(6):
        for key in keys:
            wrong = {key: expected[key].clone()}
            wrong[key][0, number] += 100
            assert agreeing(wrong, gradients, [0.0] * 6).logical_not().nonzero().tolist() == [[number]]
    gradients[1][0] = float("nan")
    assert agreeing(expected, gradients, [0.0] * 6).all()  # what is not finite is compared elsewhere
