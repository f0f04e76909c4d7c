"""Models that shuffle the channels of images keep them in the channels-last layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.engine.passes import folding, large_path, shuffles, strategy
from tests.engine.test_group_norm_layout import compare, plan_of


class Net(nn.Module):
    """Branches whose channels are shuffled; ``use`` also changes the copies, or the shuffled images if it is ``later``."""

    def __init__(self, groups: int = 2, use: Callable[[Tensor], Tensor] | None = None, later: bool = False) -> None:
        super().__init__()
        self.first, self.branch = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm, self.last, self.head = nn.BatchNorm2d(6), nn.Conv2d(12, 5, 3), nn.Linear(5, 3)
        self.groups, self.use, self.later = groups, use, later
        self.norm.running_mean.normal_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        kept, other = self._shuffled(self.first(x)).chunk(2, 1)
        h = torch.cat([kept, F.relu(self.norm(self.branch(other)), inplace=True)], 1)
        return self.head(self.last(self._shuffled(h)).tanh().mean((2, 3)))

    def _shuffled(self, x: Tensor) -> Tensor:
        size, channels, height, width = x.shape
        copy = x.view(size, self.groups, channels // self.groups, height, width).transpose(1, 2).contiguous()
        images = copy.view(size, channels, height, width)
        if self.use is None:
            return images
        return images + self.use(images if self.later else copy).flatten(1)[:, :1, None, None]


@pytest.fixture
def shuffled(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each shuffle in the channels-last layout, whether it was on a known path; small batches count as large."""
    seen: list[bool] = []
    monkeypatch.setattr(strategy, "MOST_BYTES", 0)
    for module in (folding, large_path):

        def noted(*call: Any, module: Any = module) -> Tensor | None:
            result = shuffles.shuffled_images(*call)
            if result is not None:
                seen.append(module is large_path)
            return result

        monkeypatch.setattr(module, "shuffled_images", noted)
    return seen


@pytest.mark.parametrize("groups", [2, 3])
def test_shuffled_images_have_the_statistics_of_the_reference(groups: int, shuffled: list[bool]) -> None:
    torch.manual_seed(0)
    model, x = Net(groups).eval(), torch.randn(5, 3, 9, 7)
    first, *others = [gradient_statistics(model, x, "pseudo_label").norm(2) for _ in range(4)]
    assert all(torch.equal(first, other) for other in others)
    assert shuffled == [False] * 4 + [True] * 4
    for size in (6, 1):
        compare(model, torch.randn(size, 3, 9, 7))


def _viewed(images: Tensor) -> Tensor:
    return images.view(len(images), -1)


@pytest.mark.parametrize("use", [torch.sigmoid, _viewed])
def test_copies_with_other_uses_are_contiguous(use: Callable[[Tensor], Tensor], shuffled: list[bool]) -> None:
    torch.manual_seed(0)
    model = Net(use=use).eval()
    compare(model, torch.randn(5, 3, 9, 7))
    assert not plan_of(model).lays_out
    assert not shuffled


def _strided(images: Tensor) -> Tensor:
    return images.as_strided((len(images), 4), (images.shape[1:].numel(), 1), 5)[:, 3:]


@pytest.mark.parametrize("use", [_viewed, _strided])
@pytest.mark.parametrize("first", [1, 4])
def test_models_that_need_contiguous_images_get_them(use: Any, first: int, shuffled: list[bool]) -> None:
    """In all batches, or from the fourth one on."""
    torch.manual_seed(0)
    calls: list[int] = []
    model = Net(use=lambda images: use(images) if len(calls) >= first else images.mean(1), later=True).eval()
    for _ in range(6):
        calls.append(0)
        compare(model, torch.randn(5, 3, 9, 7))
    assert bool(shuffled) == (first > 1 or use is _viewed)
