"""Entries of one tensor along its first axis, whose gradients are stacked instead of added."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.engine.passes import selects
from tests.engine.cases import worst_difference


def _in_place(x: torch.Tensor) -> torch.Tensor:
    first = x[0]
    first *= 2
    return first * x[1] + x[2]


def _base_in_place(x: torch.Tensor) -> torch.Tensor:
    first, second = x[0], x[1]
    x.mul_(2)
    return first * second


def _without_gradient(x: torch.Tensor) -> torch.Tensor:
    first, second = x[0], x[1]
    with torch.no_grad():
        first.add_(1)
    return first * second


def _view_in_place(x: torch.Tensor) -> torch.Tensor:
    first, second = x[0], x[1]
    first[:, 0].add_(second[:, 1])
    return first * second


JOINED = {
    "each": lambda x: x[0] * x[1] + x[2],
    "twice": lambda x: x[0] * x[1] + x[0],
    "from_the_end": lambda x: x[-1] * x[0] + x[2],
    "two": lambda x: x[2] * x[0],
    "changed_between": lambda x: x[0] * 3 + x.mul_(2)[1],
}
REFUSED = {
    "in_place": _in_place,
    "base_in_place": _base_in_place,
    "without_gradient": _without_gradient,
    "view_in_place": _view_in_place,
}


class _Attention(nn.Module):
    def __init__(self, mix) -> None:
        super().__init__()
        self.qkv, self.head, self.mix = nn.Linear(4, 12), nn.Linear(4, 3), mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).view(len(x), -1, 3, 4).permute(2, 0, 1, 3) * 1
        return self.head(self.mix(qkv).mean(1))


@pytest.mark.parametrize("mix", [*JOINED, *REFUSED])
def test_selected_entries(mix, monkeypatch):
    monkeypatch.setattr(selects, "LEAST_SIZE", 1)
    joined, original = [], selects._Joined._taken

    def taken(self, x, index):
        entry = original(self, x, index)
        joined.append(entry is not None)
        return entry

    monkeypatch.setattr(selects._Joined, "_taken", taken)
    torch.manual_seed(0)
    model = _Attention({**JOINED, **REFUSED}[mix]).double()
    for size in (5, 5, 5, 7):
        batch = torch.randn(size, 3, 4, dtype=torch.float64)
        found = gradient_statistics(model, batch, "pseudo_label")
        expected = gradient_statistics(model, batch, "pseudo_label", engine="reference")
        assert worst_difference(found, expected) < 1e-9
        assert any(joined)
    joined.clear()
    gradient_statistics(model, torch.randn(6, 3, 4, dtype=torch.float64), "pseudo_label")
    assert any(joined) == (mix in JOINED)


def test_backward_pass_has_one_node_for_all_entries():
    x = (torch.randn(3, 2**15) * 1).requires_grad_() * 1
    with selects.joined_selects():
        q, k, v = x[0], x[1], x[2]
    assert {q.grad_fn, k.grad_fn, v.grad_fn} == {q.grad_fn}
    assert x[0].grad_fn.name() == "SelectBackward0"
    (gradient,) = torch.autograd.grad(q.sum() + 2 * v.sum(), x)
    assert gradient[:, 0].tolist() == [1, 0, 2]
