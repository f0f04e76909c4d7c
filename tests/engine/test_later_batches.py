"""Models whose later batches differ from the probe: gradients that change without a trace, and questions that were not asked before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.engine.checks import sample_check
from tests.engine.kinds import WIDTH, Net, error_of, numbers

LARGE = 3.0


class _Clipped(torch.autograd.Function):
    """Halves the gradient of the whole batch if an input of the batch is large; no forward pass shows it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x.abs().max() > LARGE, 0.5, 1.0) * gradient


def _with_function(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.tanh(_Clipped.apply(net.a(x))))


def _with_hook(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    if h.requires_grad:
        h.register_hook(lambda gradient: torch.where(h.detach().abs().max() > LARGE, 0.5, 1.0) * gradient)
    return net.head(torch.tanh(h))


HIDDEN = {"a custom function": _with_function, "a hook": _with_hook}


@pytest.mark.filterwarnings("ignore:no fast rule")
@pytest.mark.parametrize("name", HIDDEN)
def test_gradients_that_change_with_a_rare_value_are_those_of_each_sample_alone(name: str) -> None:
    torch.manual_seed(0)
    model = Net(HIDDEN[name]).double().eval()
    for number in range(12):
        x = numbers(4, WIDTH) / 3
        if number > 4:
            x[number % 4] *= 40 * (number % 3)
        assert error_of(model, x) < 1e-8, number


def test_each_sample_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, checked = Net(_with_function).double().eval(), []

    def noted(table: Any, names: Any, laid_out: Any, state: Any, number: int, strict: bool) -> Any:
        checked.append(number)
        return sample_check.check_sample(table, names, laid_out, state, number, strict)

    monkeypatch.setattr("lightning_gradmetrics.engine.planned_batch.check_sample", noted)
    for _ in range(6):
        gradient_statistics(model, numbers(5, WIDTH) / 3, "pseudo_label")
    assert sorted(checked) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def _with_relu_as_hook(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.a(x))
    if len(x) > 3 and h.requires_grad:
        h.register_hook(torch.nn.functional.relu)
    return net.head(h)


def test_a_hook_that_is_a_function_of_torch_may_change_gradients() -> None:
    torch.manual_seed(0)
    model = Net(_with_relu_as_hook).double().eval()
    with pytest.warns(UserWarning, match="hooks on tensors"):
        for size in (5, 3, 4):
            assert error_of(model, numbers(size, WIDTH)) < 1e-8


ASKS = {"now": False}


def _sorted_first(net: Any, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()  # the order of the rows depends on the data, so there is no plan
    h = torch.tanh(net.a(x[order]))[order.argsort()]
    return net.head(h * 1.5 if ASKS["now"] and bool((x[:, 1] > 0).any()) else h)


def test_a_question_that_a_model_without_a_plan_asks_later_is_asked_of_each_sample_alone() -> None:
    """Only one of the samples would get another answer alone."""
    torch.manual_seed(0)
    model = Net(_sorted_first).double().eval()
    for _ in range(3):
        assert error_of(model, numbers(30, WIDTH)) < 1e-8
    x = numbers(30, WIDTH)
    x[:, 1] = x[:, 1].abs()
    x[17, 1] = -1.0
    ASKS["now"] = True
    try:
        with pytest.raises(ValueError, match="depend on each other"):
            gradient_statistics(model, x, "pseudo_label")
    finally:
        ASKS["now"] = False


def _sorted_with_gates(net: Any, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    h = torch.tanh(net.a(x[order]))
    before = torch.cat([x[order][:1] * 0, x[order][:-1]])
    return net.head((h * (1 + (before[:, 1:2] > 6)))[order.argsort()])


def test_a_gate_between_two_sorted_samples_is_found() -> None:
    """Only one sample has other logits than alone, and no gradient shows it: any two samples are compared in different halves."""
    torch.manual_seed(0)
    model = Net(_sorted_with_gates).double().eval()
    for _ in range(3):
        assert error_of(model, numbers(20, WIDTH)) < 1e-8
    for number in range(5):
        x = numbers(20, WIDTH)
        x[x[:, 0].argsort()[3 * number], 1] = 9.0
        with pytest.raises(ValueError, match="depend on each other"):
            gradient_statistics(model, x, "pseudo_label")


@pytest.mark.filterwarnings("ignore:no fast rule")
def test_a_setting_outside_of_the_model_that_switches_to_vmap_takes_the_model_out_of_its_plan() -> None:
    maps = [False]

    class Mapping(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return torch.func.vmap(super().forward)(x) if maps[0] else super().forward(x)

    model, x = Mapping(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval(), torch.randn(5, 6).double()
    before = gradient_statistics(model, x, "pseudo_label")
    maps[0] = True
    after = gradient_statistics(model, x, "pseudo_label")
    torch.testing.assert_close(after.moments, before.moments)
