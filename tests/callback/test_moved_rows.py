"""The column ``index`` if hooks of the module or of the data module move or change the rows of a batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_gradmetrics.callback.transfers import Transfers
from lightning_gradmetrics.classifier.row_order import RowOrder
from lightning_gradmetrics.classifier.transferred_order import row_marks, transferred_order
from tests.callback.indexed import (
    EXPECTED_WARNINGS,
    LOADERS,
    Indexed,
    Numbered,
    assert_exact,
    numbers_received,
    observed,
)
from tests.callback.runs import trainer

pytestmark = EXPECTED_WARNINGS


class Hooked(Indexed):
    """Applies a change to each batch in one of the hooks that transfer it to the device."""

    change: Callable[[Any], Any]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.change(batch)


class HookedAfter(Indexed):
    change: Callable[[Any], Any]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.change(batch)


class HookedTransfer(Indexed):
    change: Callable[[Any], Any]

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return self.change(super().transfer_batch_to_device(batch, device, dataloader_idx))


def sorted_by_label(batch: Any) -> Any:
    order = batch[1].argsort(descending=True)
    return [batch[0][order], batch[1][order]]


def reversed_in_place(batch: Any) -> Any:
    for tensor in batch:
        tensor.copy_(tensor.flip(0))
    return batch


def scaled(batch: Any) -> Any:
    return [3 * batch[0] + 2, batch[1]]


def scaled_and_reversed(batch: Any) -> Any:
    return [(3 * batch[0] + 2).flip(0), batch[1].flip(0)]


def noisy(batch: Any) -> Any:
    """Random values, as of a strong augmentation; labels are kept."""
    return [torch.cat([batch[0][:, :1], torch.randn(len(batch[0]), 2)], 1).roll(1, 1), batch[1]]


@pytest.mark.parametrize("stage", ["validate", "predict"])
@pytest.mark.parametrize("kind", [Hooked, HookedAfter, HookedTransfer])
@pytest.mark.parametrize("change", [sorted_by_label, reversed_in_place])
def test_the_index_follows_hooks_that_move_rows(change: Callable[[Any], Any], kind: Any, stage: str) -> None:
    callback, module = observed(), kind()
    module.change = change
    used = trainer(callback)
    for loader in (DataLoader(Numbered(), 4), LOADERS["shuffle"]()):
        getattr(used, stage)(module, loader)
        assert_exact(callback, 11)
        assert callback.results["label"].to_pylist() == [index % 3 for index in numbers_received(callback)]
        if stage == "validate":
            assert "convert_input" not in vars(used.precision_plugin)


@pytest.mark.parametrize(
    ("change", "is_known"),
    [(scaled, True), (scaled_and_reversed, False), (noisy, False)],
    ids=["scaled", "moved", "noise"],
)
def test_hooks_that_change_values_keep_the_index_only_if_the_order_is_certain(
    change: Callable[[Any], Any], is_known: bool
) -> None:
    callback, module = observed(), HookedAfter()
    module.change = change
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        trainer(callback).test(module, DataLoader(Numbered(), 11), verbose=False)
    about = [str(one.message) for one in heard if "index of the rows" in str(one.message)]
    index = callback.results["index"].to_pylist()
    if is_known:
        assert index == list(range(11)) and not about
    else:
        assert index == [None] * 11
        assert len(about) == 1 and "on_after_batch_transfer" in about[0] and "sample_id=" in about[0]


class HookedData(LightningDataModule):
    def test_dataloader(self) -> Any:
        return LOADERS["shuffle"]()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return sorted_by_label(batch)


def test_a_data_module_may_move_rows() -> None:
    callback = observed()
    trainer(callback).test(Indexed(), datamodule=HookedData(), verbose=False)
    assert_exact(callback, 11)


class Photo:
    def __init__(self, image: Tensor, label: Tensor) -> None:
        self.image, self.label = image, label


class FlipsPhotos(Indexed):
    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return Photo(batch.image.flip(0), batch.label.flip(0))

    def step(self, batch: Any) -> Any:
        return self(batch.image)


def test_the_rows_of_an_object_are_followed() -> None:
    """The labels of a batch, 0, 1, 2, 0, do not determine the order."""
    callback = observed()
    loader = DataLoader(Numbered(), 4, collate_fn=lambda rows: Photo(*torch.utils.data.default_collate(rows)))
    trainer(callback).test(FlipsPhotos(), loader, verbose=False)
    assert_exact(callback, 11)


@pytest.mark.parametrize("certain", [torch.ones(1, 3), torch.arange(12.0).view(4, 3)], ids=["one sample", "unchanged"])
def test_a_certain_order_is_no_evidence_for_batches_with_changed_values(certain: Tensor) -> None:
    used, module = trainer(observed()), HookedAfter()
    transfers = Transfers(used, module)
    used.precision_plugin.convert_input(certain)
    transfers.reaches_step(certain)
    assert transfers.moved(len(certain)) is None
    batch = torch.arange(6.0).view(2, 3)
    used.precision_plugin.convert_input(batch)
    transfers.reaches_step(-batch.flip(0))  # ranks are those of the batch
    moved = transfers.moved(2)
    transfers.stop()
    assert moved is not None and moved.tolist() == [-1, -1] and "convert_input" not in vars(used.precision_plugin)


def test_rows_that_differ_in_a_few_entries_are_followed() -> None:
    """Words of a large vocabulary: most entries are 0 in all rows; labels repeat."""
    words, labels, order = torch.zeros(4, 5000), torch.tensor([0, 1, 0, 1]), torch.tensor([2, 1, 3, 0])
    words[torch.arange(4), torch.tensor([7, 11, 13, 4001])] = 1
    before, after = row_marks([words, labels]), row_marks([words[order], labels[order]])
    found = transferred_order(before, after, 4)
    assert found is not None and found.order is not None and found.order.tolist() == order.tolist()
    assert transferred_order(before, row_marks([words, labels]), 4) == RowOrder(bits=math.inf)
    twins = torch.zeros(4, 5000)
    assert transferred_order(row_marks([twins]), row_marks([words]), 4) is None
