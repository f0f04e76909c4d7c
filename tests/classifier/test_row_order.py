"""The order in which a step passes the samples of a batch to the model."""

from __future__ import annotations

import pytest
import torch

from lightning_gradmetrics.classifier.row_order import row_order

IDS, SAME = torch.arange(28).view(4, 7), torch.ones(4, 7, dtype=torch.long)
ORDER = torch.tensor([2, 0, 3, 1])


@pytest.mark.parametrize("mask", [SAME, torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0]])], ids=["equal", "pairs"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_mask_does_not_hide_the_order(mask: torch.Tensor, is_first: bool) -> None:
    received, batch = [IDS[ORDER], mask[ORDER]], [IDS, mask]
    if is_first:
        received, batch = received[::-1], batch[::-1]
    found = row_order(received, batch)
    assert found is not None and found.order is not None and torch.equal(found.order, ORDER)


def test_samples_in_the_same_order_have_none() -> None:
    found = row_order([IDS, SAME], [SAME, IDS])
    assert found is not None and found.order is None and found.bits == 0


def test_equal_rows_of_one_tensor_are_ordered_by_the_others() -> None:
    ids, lengths = torch.tensor([[1, 2], [3, 4], [1, 2], [1, 2]]), torch.tensor([5, 6, 7, 8])
    order = torch.tensor([3, 1, 0, 2])
    found = row_order([ids[order], lengths[order]], [ids, lengths])
    assert found is not None and found.order is not None and torch.equal(found.order, order)
