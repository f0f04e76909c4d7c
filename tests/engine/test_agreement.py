"""Moments of a gradient are compared with those of another computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_gradmetrics.engine.passes.agreement import agreeing
from lightning_gradmetrics.engine.passes.expected import BLOCK, SMALL, Expected
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


def loss_of(linear: torch.nn.Linear, uses: int) -> torch.Tensor:
    x = torch.ones(1, linear.in_features)
    for _ in range(uses):
        x = linear(x).tanh()
    return x.sum()


@pytest.mark.parametrize("uses", [1, 2])
def test_large_gradients_are_reduced_as_they_arrive_and_no_hook_remains(uses: int) -> None:
    torch.manual_seed(0)
    linear, keys = torch.nn.Linear(400, 400), ["max", "min", "sum", 1.0, 2.0]
    parameters = list(linear.parameters())
    gradients = torch.autograd.grad(loss_of(linear, uses), parameters)
    found = Expected.of_loss(loss_of(linear, uses), parameters, keys)
    for number, gradient in enumerate(gradients):
        for key, moment in gradient_moments(gradient[None], keys).items():
            torch.testing.assert_close(found.moments[key][number], moment[0], rtol=1e-5, atol=1e-5)
    assert found.entries == [160_000, 400]
    assert all(parameter._backward_hooks is None for parameter in parameters)


def test_a_backward_pass_inside_a_backward_pass_gets_the_gradients_themselves() -> None:
    """It would get tensors without values, so all gradients are computed again without hooks."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(400, 400)

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            with torch.enable_grad():
                inner = torch.autograd.grad(loss_of(linear, 1), linear.weight)[0]
            return gradient * inner.norm()

    for is_frozen in (False, True):  # the outer pass reaches the weight, or the inner one only
        weight = linear.weight.detach() if is_frozen else linear.weight
        ones = torch.ones(1, 400, requires_grad=True)
        x = ones @ weight.T + linear.bias
        parameters = list(linear.parameters())
        loss = Nested.apply(x).sum()  # type: ignore[no-untyped-call]
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        found = Expected.of_loss(loss, parameters, ["sum"])
        expected = torch.stack([gradient.double().sum() for gradient in gradients])
        torch.testing.assert_close(found.moments["sum"], expected, rtol=1e-5, atol=1e-5)
