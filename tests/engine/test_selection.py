"""Entries of a parameter that a derived tensor consists of, which are kept for later batches."""

import pytest
import torch

from lightning_gradmetrics.engine.selection import selection_of


def _lookup(table, index):
    return table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1).contiguous().unsqueeze(0)


def _expected(derived, table, rows):
    """Return the gradients of the table, sorted, without those of entries that are not selected."""
    (gradients,) = torch.autograd.grad(derived, [table], [rows], is_grads_batched=True, retain_graph=True)
    return gradients.flatten(1).sort(1).values


@pytest.mark.parametrize("function", [_lookup, lambda table, index: table.expand(2, 7, 3)[:, 1:].mT[..., index[0]]])
def test_selections_follow_every_change_of_an_index(function):
    """Also a change that no version shows, and another layout of the same values."""
    torch.manual_seed(0)
    table, index = torch.randn(7, 3, requires_grad=True), torch.arange(6).view(2, 3)
    kept = selection_of(function(table, index), table)
    assert selection_of(function(table, index.clone()), table) is kept
    index.data[0] = torch.tensor([2, 2, 5])
    for changed in (index, index.flip(0), index.view(3, 2)):
        derived = function(table, changed)
        selection = selection_of(derived, table)
        rows = torch.randn(4, *derived.shape)
        touched = selection.touched(rows.flatten(1))
        padded = (
            torch.nn.functional.pad(touched, (0, table.numel() - touched.shape[1]))
            if touched.shape[1] < 21
            else touched
        )
        expected = _expected(derived, table, rows)
        torch.testing.assert_close(padded.sort(1).values[:, -21:], expected)
        assert selection is not kept


def test_tables_of_another_shape_have_another_selection():
    index = torch.tensor([[0, 2], [1, 1]])
    narrow, wide = torch.randn(4, 6, requires_grad=True), torch.randn(8, 3, requires_grad=True)
    first, second = (selection_of(table.view(-1)[index], table) for table in (narrow, wide))
    assert torch.equal(first.entries, second.entries)
    assert not torch.equal(selection_of(narrow[index], narrow).entries[:8], selection_of(wide[index], wide).entries[:8])
