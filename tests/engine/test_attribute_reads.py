"""A plan depends on the attributes that the forward pass reads, and on no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_gradmetrics as lgm
from lightning_gradmetrics.engine import auto
from lightning_gradmetrics.engine.tracing.attribute_reads import reading_attributes


class Counting(nn.Module):
    """Has a counter that the forward pass ignores, and flags that it reads in several ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.seen, self.mode, self.power, self.by_dictionary = 0, "plain", 1, False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x).tanh()
        if self.mode == "power":
            hidden = hidden**self.power
        elif self.mode == "dictionary" and vars(self)["by_dictionary"]:
            hidden = hidden.abs()
        return self.head(hidden)


def values(model: nn.Module, x: Tensor, engine: str = "auto") -> Tensor:
    return lgm.gradient_statistics(model, x, "pseudo_label", statistics=("l2",), engine=engine).statistic("l2")


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    tasks, make = [], auto.make_strategy

    def counted(task: Any, on_batch: bool) -> Any:
        tasks.append(task)
        return make(task, on_batch)

    monkeypatch.setattr(auto, "make_strategy", counted)
    return tasks


def test_a_counter_that_only_the_step_reads_is_not_a_reason_to_plan_again(planned: list[Any]) -> None:
    model = Counting()
    for _ in range(5):
        model.seen += 4
        values(model, torch.randn(4, 4))
    assert len(planned) == 1


def test_every_value_of_an_attribute_that_is_read_has_its_own_plan(planned: list[Any]) -> None:
    model, x = Counting(), torch.randn(4, 4)
    for mode, power, by_dictionary in [
        ("plain", 1, False),
        ("plain", 2, True),  # neither is read
        ("power", 2, True),
        ("power", 3, False),
        ("dictionary", 3, False),
        ("dictionary", 3, True),
    ]:
        model.mode, model.power, model.by_dictionary = mode, power, by_dictionary
        torch.testing.assert_close(values(model, x), values(model, x, "reference"), rtol=1e-5, atol=1e-7)
    assert len(planned) == 5


def test_kept_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "MOST_KINDS", 3)
    model, x = Counting(), torch.randn(4, 4)
    model.mode = "power"
    for power in range(1, 7):
        model.power = power
        values(model, x)
    assert len(auto._STRATEGIES[model]) == 3


def test_attribute_access_is_as_before_afterwards() -> None:
    linear = nn.Linear(2, 2)
    with reading_attributes(linear) as names, reading_attributes(linear) as others:
        assert not hasattr(linear, "missing")
    assert "missing" in names and "missing" in others
    assert "__getattribute__" not in vars(nn.Module) and "__getattribute__" not in vars(nn.Linear)
