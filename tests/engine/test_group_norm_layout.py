"""Large models with group norms run in the channels-last layout, with a group norm that is exact there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradmetrics.engine import auto, gradient_statistics
from lightning_gradmetrics.engine.kernels import library
from lightning_gradmetrics.engine.passes import folding, strategy
from lightning_gradmetrics.engine.passes.plan import Plan
from lightning_gradmetrics.engine.rules.norm import channels_last_group_norm
from tests.engine.cases import worst_difference

needs_kernels = pytest.mark.skipif(library.library_for(torch.float32) is None, reason="no compiled kernels")


class Net(nn.Module):
    """Two convolutions with group norms whose inputs are far from zero."""

    def __init__(self, norm: nn.Module | None = None, views: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2)
        self.norms = nn.ModuleList([nn.GroupNorm(4, 8), norm or nn.GroupNorm(3, 12)])
        self.head, self.views = nn.Linear(12, 3), views
        with torch.no_grad():
            self.first.bias.add_(100)  # type: ignore[union-attr]
            for each in self.norms:
                for parameter in each.parameters():
                    parameter.normal_()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norms[0](self.first(x)), inplace=True)
        h = self.norms[1](self.second(h))
        return self.head((h.view(len(h), -1) if self.views else h).reshape(len(h), 12, -1).amax(2))


@pytest.fixture
def normed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each group norm in the channels-last layout was exact; small batches count as large."""
    seen: list[bool] = []
    run = folding.channels_last_group_norm

    def noted(values: dict[str, Any]) -> Tensor | None:
        result = run(values)
        seen.append(result is not None)
        return result

    monkeypatch.setattr(folding, "channels_last_group_norm", noted)
    monkeypatch.setattr(strategy, "MOST_BYTES", 0)
    return seen


def compare(model: nn.Module, x: Tensor) -> None:
    """Compare the statistics of a float32 model with those of the same model in float64, which is the slow reference."""
    found = gradient_statistics(model, x, "pseudo_label", None, True)
    model.double()
    exact = gradient_statistics(model, x.double(), "pseudo_label", None, True, engine="reference")
    model.float()
    assert worst_difference(found, exact, floor=1e-2) < 1e-4


def plan_of(model: nn.Module) -> Plan:
    """Return the plan of a model that has been called once."""
    for (found,) in filter(None, auto._STRATEGIES[model].values()):
        if found.plan is not None:
            return found.plan
    raise AssertionError


@needs_kernels
def test_group_norms_are_exact_in_the_channels_last_layout(normed: list[bool]) -> None:
    torch.manual_seed(0)
    model = Net()
    for _ in range(3):
        compare(model, torch.randn(7, 3, 6, 6))
    assert normed == [True] * 6
    assert plan_of(model).lays_out


@needs_kernels
@pytest.mark.parametrize(
    "model", [lambda: Net(views=True), lambda: Net(nn.GroupNorm(3, 12, affine=False))], ids=["view", "no parameters"]
)
def test_models_that_need_their_layout_keep_it(model: Any, normed: list[bool]) -> None:
    torch.manual_seed(0)
    model = model()
    for _ in range(2):
        compare(model, torch.randn(7, 3, 6, 6))
    assert len(normed) <= 2  # a model that makes views fails in its first batch, and is not tried again
    assert not plan_of(model).lays_out


SHAPES = [(4, 16, (8, 8)), (2, 6, (5, 7)), (1, 1, (2, 3)), (8, 200, (2, 3)), (3, 96, (9, 11)), (4, 64, (3, 1))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("groups", "channels", "size"), SHAPES)
@pytest.mark.parametrize("first", [0.0, 1e4])
def test_channels_last_group_norm(groups: int, channels: int, size: Any, first: float, dtype: torch.dtype) -> None:
    """Far from zero, and with an unusual first position, where the kernel begins."""
    torch.manual_seed(0)
    if library.library_for(dtype) is None:
        pytest.skip("no compiled kernels")
    x = 1000 + torch.randn(3, channels, *size, dtype=dtype)
    x[:, :, 0, 0] += first
    x = x.to(memory_format=torch.channels_last)
    g, weight, bias = torch.randn_like(x), torch.randn(channels, dtype=dtype), torch.randn(channels, dtype=dtype)
    values = {"input": x, "num_groups": groups, "eps": 0.1, "weight": weight, "bias": bias}
    leaves = x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    exact = [leaf.detach().double().contiguous().requires_grad_() for leaf in leaves]
    if x.is_contiguous():
        assert channels_last_group_norm(values) is None
        return
    y, expected = channels_last_group_norm(values), F.group_norm(exact[0], groups, *exact[1:], eps=0.1)
    assert y is not None and y.stride() == x.stride()
    found = torch.autograd.grad(y, leaves, g)
    bound = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(y.double(), expected, rtol=bound, atol=bound)
    for gradient, right in zip(found, torch.autograd.grad(expected, exact, g.double()), strict=True):
        torch.testing.assert_close(gradient.double(), right, rtol=bound, atol=10 * bound)
