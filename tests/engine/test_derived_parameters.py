"""Parameters that a model reorders, selects or looks up before it uses them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.engine.derivation import Derivation, DerivedUse
from lightning_gradmetrics.engine.uses import RowsUse, StackedUse
from tests.engine.layers import Summed, check_layer, normal


def test_reordered_parameters_are_not_pulled_back(monkeypatch):
    """The entries of a transposed or reshaped parameter have the parameter's statistics."""

    class Reordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.kernel = nn.Parameter(normal(6, 4)), nn.Parameter(normal(4, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x @ self.weight.view(2, 3, 4).permute(2, 1, 0).reshape(4, 6)
            return torch.nn.functional.conv1d(y.mT, self.kernel.t().unsqueeze(2).contiguous().view(4, 6, 1))

    layer = Reordered()
    check_layer(layer, normal(3, 5, 4))
    monkeypatch.delattr(DerivedUse, "gradient")
    gradient_statistics(Summed(layer), (normal(3, 5, 4),), "pseudo_label")


@pytest.mark.parametrize("others", [(), (2,), (2, 2)], ids=str)
def test_entries_of_a_stack_are_not_pulled_back(others, monkeypatch):
    """The matrices of experts have their own statistics; those of entries that are not used are zero."""

    class Stack(nn.Module):
        def __init__(self, is_scaled: bool) -> None:
            super().__init__()
            self.weights, self.is_scaled = nn.Parameter(normal(5, 4, 4)), is_scaled

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for index in (0, -1, torch.tensor(1), *others):
                x = torch.tanh(nn.functional.linear(x, self.weights[index]))
            return x @ (2 * self.weights[3]) if self.is_scaled else x + self.weights[-1, 0]

    check_layer(Stack(is_scaled=True), normal(3, 6, 4))
    check_layer(Stack(is_scaled=False), normal(3, 6, 4))
    monkeypatch.delattr(DerivedUse, "gradient")
    stack = Stack(is_scaled=False)
    stack.forward = lambda x: torch.tanh(x @ stack.weights[4]) @ stack.weights[-2]
    gradient_statistics(Summed(stack), (normal(3, 6, 4),), "pseudo_label")


@pytest.mark.parametrize("convert", [torch.Tensor.to, torch.Tensor.type_as])
def test_parameters_that_take_the_type_of_the_samples(convert):
    class Converted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shifts, self.scales = nn.Embedding(7, 4), nn.Parameter(normal(5, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shifts = convert(self.shifts(torch.arange(5)), x)
            return torch.tanh(x + shifts) * convert(2 * self.scales, x)

    check_layer(Converted(), normal(3, 5, 4))


def test_entries_without_a_use_have_gradients_of_zero():
    use = RowsUse(torch.tensor([[1.0, 3.0], [-2.0, -1.0]]))
    moments = StackedUse({1: use}, 2).moments(["min", "max", "sum"])
    assert torch.stack([moments["min"], moments["max"], moments["sum"]]).tolist() == [[0, -2], [3, 0], [4, -3]]
    assert StackedUse({0: use}, 1).moments(["min"])["min"].tolist() == [1, -2]
    assert StackedUse({1: use}, 2).gradient().tolist() == [[[0, 0], [1, 3]], [[0, 0], [-2, -1]]]


@pytest.mark.parametrize("padding", [None, 1, -1])
def test_shared_rows_of_a_table_are_not_pulled_back(padding, monkeypatch):
    """Position embeddings have no gradient of the whole table for each sample."""

    class Positions(nn.Module):
        def __init__(self, scale: int | None = None) -> None:
            super().__init__()
            self.table, self.scale = nn.Embedding(5, 3, padding_idx=padding), scale

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * self.table(torch.tensor([[0, 4, 1, 4]])) + self.table(torch.tensor(2))
            if self.scale is None:
                return y
            return y + nn.functional.embedding(torch.tensor([3]), self.table.weight * self.scale)

    check_layer(Positions(scale=2), normal(3, 4, 3))
    layer = Positions()
    check_layer(layer, normal(3, 4, 3))
    monkeypatch.delattr(DerivedUse, "gradient")
    gradient_statistics(Summed(layer), (normal(3, 4, 3),), "pseudo_label")


SELECTED = {
    "a slice": lambda table: table[:5].unsqueeze(0),
    "repeated entries": lambda table: table[torch.tensor([[0, 1, 1], [3, 0, 0]])].permute(1, 0, 2).contiguous()[0],
    "a row without a gradient": lambda table: torch.nn.functional.embedding(
        torch.tensor([2, 1, 2, 0]), table, padding_idx=2
    )[1:],
    "an expanded entry": lambda table: table.index_select(0, torch.tensor([4])).expand(3, 4),
}


@pytest.mark.parametrize("select", SELECTED.values(), ids=SELECTED)
def test_selected_entries_are_not_pulled_back(select, monkeypatch):
    """A table of positions has gradients at the selected entries only, and zeros elsewhere."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(normal(6, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + select(self.table)).tanh()

    inputs = normal(3, *select(Positions().table).shape[-2:])
    check_layer(Positions(), inputs)
    monkeypatch.delattr(DerivedUse, "gradient")
    gradient_statistics(Summed(Positions()), (inputs,), "pseudo_label")


def test_gradients_scaled_by_frequency_are_pulled_back():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(normal(6, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.nn.functional.embedding(torch.tensor([1, 1, 2]), self.table, scale_grad_by_freq=True)

    check_layer(Positions(), normal(3, 3, 4))


def test_one_backward_pass_pulls_back_to_all_parameters(monkeypatch):
    """A position bias that a small network computes, as in Swin V2, depends on several parameters."""
    passes = []
    gradients = Derivation.gradients
    monkeypatch.setattr(Derivation, "gradients", lambda *args: passes.append(args[1]) or gradients(*args))

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 4, bias=False))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            table = self.network(torch.linspace(-1, 1, 12, dtype=x.dtype).view(6, 2))
            return (x + table[torch.tensor([0, 3, 3])].sigmoid() * 16).tanh()

    layer = Positions()
    check_layer(layer, normal(3, 3, 4))
    passes.clear()
    gradient_statistics(Summed(layer), (normal(3, 3, 4),), "pseudo_label")
    assert {*map(len, passes)} == {3}
