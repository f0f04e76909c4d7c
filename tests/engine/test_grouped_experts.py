"""Mixtures of experts whose rows are multiplied in groups are handled by recovered owners, without a slow way."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_gradmetrics.engine import gradient_statistics
from tests.engine.cases import needs_grouped_products

EXPERTS, WIDTH = 3, 8


class _Experts(nn.Module):
    """Sends each position to one expert; the rows are sorted by expert for one grouped product."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 4)
        self.weights = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weight, expert = self.router(rows).softmax(1).max(1)
        order = expert.argsort(stable=True)
        ends = torch.bincount(expert, minlength=EXPERTS).cumsum(0).to(torch.int32)
        products = torch._grouped_mm(rows[order], self.weights.transpose(1, 2), offs=ends)
        mixed = torch.zeros_like(rows).index_copy(0, order, products.to(rows.dtype)) * weight[:, None]
        logits: Tensor = self.head(torch.tanh(mixed).view_as(x).mean(1))
        return logits


@needs_grouped_products
def test_grouped_experts_are_exact_without_a_slow_way() -> None:
    torch.manual_seed(0)
    model = _Experts().eval()
    for size in (3, 5, 1, 6):
        x = torch.randn(size, 5, WIDTH)
        expected = gradient_statistics(model, x, "pseudo_label", per_parameter=True, engine="reference").norm(2)
        found = gradient_statistics(model, x, "pseudo_label", per_parameter=True).norm(2)  # a warning would be an error
        assert float(((found - expected) / expected.norm(dim=1, keepdim=True)).abs().max()) < 1e-5


class _Unique(nn.Module):
    """Computes each distinct sample once; a batch norm has one row per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        distinct, places = torch.unique(x, dim=0, return_inverse=True)
        logits: Tensor = self.head(torch.tanh(self.norm(self.body(distinct))))[places]
        return logits


def test_batch_norms_without_positions_are_exact_without_a_plan() -> None:
    torch.manual_seed(0)
    model = _Unique().eval()
    for _ in range(2):
        x = torch.randn(5, WIDTH)
        expected = gradient_statistics(model, x, "pseudo_label", per_parameter=True, engine="reference").norm(2)
        found = gradient_statistics(model, x, "pseudo_label", per_parameter=True).norm(2)
        assert float(((found - expected) / expected.norm(dim=1, keepdim=True)).abs().max()) < 1e-5
