"""The column ``index``: the index in the dataset of each row, or null with one warning; checked by a dataset that returns it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import lightning_gradmetrics as lgm
from lightning_gradmetrics.callback.transfers import Transfers
from lightning_gradmetrics.classifier.row_order import RowOrder
from lightning_gradmetrics.classifier.transferred_order import row_marks, transferred_order
from tests.callback.runs import Stepped, assert_scores, batches, column, mlp, numbers, trainer
from tests.models import fast_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:Your .*'s sampler has shuffling enabled"),
    pytest.mark.filterwarnings("ignore:.*(persistent_workers|have many workers)"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode|You are using a custom batch sampler"),
    pytest.mark.filterwarnings("ignore:[0-9]+ dataloaders and no roles"),
]
STAGES = ["validate", "test", "predict"]


class Numbered(torch.utils.data.Dataset[Any]):
    """Each sample contains its index as its first feature."""

    def __init__(self, size: int = 11) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, list):
            return torch.stack([self[each][0] for each in index]), torch.tensor(index) % 3
        index = int(index) % self.size
        return torch.tensor([float(index), 1.0, -1.0], dtype=torch.float64), index % 3


def received(evidence: Any) -> Tensor:
    """Return the index stored in each row of the model's input."""
    return evidence.features[:, 0].long()


class Batches:
    """Batches that do not come from a DataLoader."""

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(Numbered(), 4))


class Indexed(Stepped):
    def __init__(self) -> None:
        super().__init__(mlp(3, 3))


def observed(stages: Any = None, **options: Any) -> lgm.GradientMetrics:
    return lgm.GradientMetrics("gradnorm", columns={"received": received}, stages=stages, **options)


def assert_exact(callback: lgm.GradientMetrics, rows: int) -> None:
    table = callback.results
    assert table.num_rows == rows and table["index"].to_pylist() == numbers_received(callback)


def numbers_received(callback: lgm.GradientMetrics) -> list[int]:
    return [number for (number,) in callback.results["received"].to_pylist()]


class Reused(Sampler[list[int]]):
    """Yields the same list object repeatedly, draws random numbers when a pass starts, and has no length."""

    def __iter__(self) -> Iterator[list[int]]:
        return self.generate(torch.randperm(11).tolist())

    def generate(self, order: list[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        while order:
            batch[:] = [order.pop() for _ in range(min(3, len(order)))]
            yield batch


class Numpy(Sampler[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(np.random.default_rng(0).permutation(11))

    def __len__(self) -> int:
        return 11


class Tensors(Sampler[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(torch.randperm(11))

    def __len__(self) -> int:
        return 11


class FromTheEnd(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(-1, -12, -1))

    def __len__(self) -> int:
        return 11


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "shuffle": lambda: DataLoader(Numbered(), 4, shuffle=True),
    "workers": lambda: DataLoader(Numbered(), 2, shuffle=True, num_workers=2, prefetch_factor=3),
    "persistent": lambda: DataLoader(Numbered(), 2, shuffle=True, num_workers=1, persistent_workers=True),
    "dropped": lambda: DataLoader(Numbered(), 4, shuffle=True, drop_last=True),
    "list": lambda: DataLoader(Numbered(), 4, sampler=[3, 1, 2, 0, 9]),
    "subset": lambda: DataLoader(Numbered(), 4, sampler=SubsetRandomSampler([3, 1, 2, 7, 8])),
    "batch sampler": lambda: DataLoader(Numbered(), batch_sampler=BatchSampler(RandomSampler(range(11)), 3, False)),
    "numpy": lambda: DataLoader(Numbered(), 4, sampler=Numpy()),
    "tensors": lambda: DataLoader(Numbered(), 4, sampler=Tensors()),
    "negative": lambda: DataLoader(Numbered(), 4, sampler=FromTheEnd()),
    "concatenated": lambda: DataLoader(ConcatDataset([Numbered(11)]), 4, shuffle=True),
}
OF_TEST: dict[str, Callable[[], DataLoader[Any]]] = {
    "a list of batches": lambda: DataLoader(Numbered(), batch_sampler=[[4, 3], [9], [0, 1, 2]]),
    "reused": lambda: DataLoader(Numbered(), batch_sampler=Reused()),
    "bulk": lambda: DataLoader(Numbered(), batch_size=None, sampler=BatchSampler(RandomSampler(range(11)), 3, False)),
}
"""Loaders that ``trainer.predict`` does not accept, or of which it changes the sampler."""


@pytest.mark.parametrize("stage", fast_rows(STAGES, ["test"]))
@pytest.mark.parametrize("kind", [*LOADERS, *OF_TEST])
def test_the_index_is_that_of_the_sample(kind: str, stage: str) -> None:
    if stage == "predict" and kind in OF_TEST:
        pytest.skip("Lightning makes such a loader again, with another sampler")
    loader = {**LOADERS, **OF_TEST}[kind]()
    before = dict(vars(loader))
    callback = observed()
    used = trainer(callback)
    for _ in range(2):
        getattr(used, stage)(Indexed(), loader)
        assert callback.results.num_rows >= 5
        assert_exact(callback, callback.results.num_rows)
    iterator = vars(loader).pop("_iterator")
    assert vars(loader) == {name: value for name, value in before.items() if name != "_iterator"}
    assert iterator is None or iterator._index_sampler is loader.batch_sampler or stage == "predict"


@pytest.mark.parametrize("stage", ["test", "predict"])
@pytest.mark.parametrize(
    "options",
    [{"batch_size": 4, "sampler": WeightedRandomSampler([1.0] * 11, 30)}, {"batch_sampler": [[3, 1], [1, 1, 0], [3]]}],
    ids=["sampler", "list"],
)
def test_a_sample_that_is_drawn_again_counts_once(options: dict[str, Any], stage: str) -> None:
    if stage == "predict" and "batch_sampler" in options:
        pytest.skip("Lightning does not accept a list of batches")
    callback = observed()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        getattr(trainer(callback), stage)(Indexed(), DataLoader(Numbered(), **options))
    index = callback.results["index"].to_pylist()
    assert index == numbers_received(callback) and len(set(index)) == len(index) >= 3
    assert any("more than once: the results keep the first row" in str(one.message) for one in heard)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2, 1.0])
def test_several_loaders_with_two_callbacks(limit: Any) -> None:
    first, second = observed(), observed(prefix="second")
    used = trainer(first, second, limit_test_batches=limit)
    loaders = [LOADERS["shuffle"](), LOADERS["workers"](), DataLoader(Numbered(), 5), LOADERS["numpy"]()]
    for _ in range(2):
        used.test(Indexed(), loaders, verbose=False)
        for callback in (first, second):
            assert_exact(callback, 44 if limit == 1.0 else 4 * 2 + 2 * 2 + 5 * 2 + 4 * 2)
    assert "setup_data" not in vars(used.test_loop)
    assert type(loaders[0].batch_sampler) is BatchSampler


class Peeks(Callback):
    """Reads a batch of a loader when the run starts."""

    def __init__(self, place: int) -> None:
        self.place = place

    def on_test_start(self, used: Any, module: Any) -> None:
        loaders = used.test_dataloaders
        next(iter(loaders[self.place]))


@pytest.mark.parametrize("place", [0, 1])
def test_a_hook_that_reads_a_loader_too(place: int) -> None:
    """The pass over the first loader is known; the pass over a later loader is unknown if a hook starts another one."""
    callback = observed()
    loaders = [LOADERS["shuffle"](), LOADERS["shuffle"]()]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        trainer(Peeks(place), callback, Peeks(place)).test(Indexed(), loaders, verbose=False)
    about = [str(one.message) for one in heard if "index of the rows" in str(one.message)]
    index, expected = callback.results["index"].to_pylist(), numbers_received(callback)
    if place == 0:
        assert index == expected and not about
    else:
        assert index == expected[:11] + [None] * 11 and len(about) == 1


class Order(Callback):
    """Stores the batches of each validation, and a random number drawn after it."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_validation_batch_end(self, used: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.seen.append(batch[0][:, 0].tolist())

    def on_validation_end(self, used: Any, module: Any) -> None:
        self.seen.append(float(torch.rand(())))


class Watches(Callback):
    """Checks the index after each validation of a fit."""

    def __init__(self, callback: lgm.GradientMetrics) -> None:
        self.callback, self.checked = callback, 0

    def on_validation_end(self, used: Any, module: Any) -> None:
        if not used.sanity_checking:
            assert_exact(self.callback, 11)
            self.checked += 1


@pytest.mark.parametrize("reload", [0, 1])
@pytest.mark.parametrize("shared", [False, True])
def test_a_fit_whose_validation_is_shuffled(reload: int, shared: bool) -> None:
    """The index is exact in each epoch, even if training uses the same loader; the callback does not change the order."""
    orders = []
    for is_observed in (True, False):
        torch.manual_seed(3)
        loader = DataLoader(Numbered(), 4, shuffle=True)
        training = loader if shared else DataLoader(Numbered(), 4, shuffle=True)
        order, callback = Order(), observed()
        watches = Watches(callback)
        used = trainer(
            *([callback, watches] if is_observed else []),
            order,
            max_epochs=3,
            reload_dataloaders_every_n_epochs=reload,
        )
        used.fit(Indexed(), training, loader)
        orders.append(order.seen)
        assert watches.checked == (3 if is_observed else 0) and type(loader.batch_sampler) is BatchSampler
    assert orders[0] == orders[1]


class Fails(Indexed):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.step(batch)
        if batch_idx == 1:
            raise RuntimeError("the user's own")


def test_an_exception_restores_the_loader() -> None:
    loader, callback = DataLoader(Numbered(), 2, shuffle=True, num_workers=1, persistent_workers=True), observed()
    used = trainer(callback)
    with pytest.raises(RuntimeError, match="the user's own"):
        used.test(Fails(), loader, verbose=False)
    assert type(loader.batch_sampler) is BatchSampler and "setup_data" not in vars(used.test_loop)
    assert_exact(callback, 2)
    used.validate(Indexed(), loader, verbose=False)
    assert_exact(callback, 11)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (Numbered()[index] for index in range(7))


class Backwards(DataLoader[Any]):
    """A loader that changes the order of its batches."""

    def __iter__(self) -> Any:
        return iter(list(super().__iter__())[::-1])


class Keys(Numbered):
    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(ord(index) - ord("a"))


class NumberedKeys(Numbered):
    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index - 900)


UNKNOWN: dict[str, Callable[[], Any]] = {
    "iterable": lambda: DataLoader(Stream(), 3),
    "own order": lambda: Backwards(Numbered(), 4),
    "out of order": lambda: DataLoader(Numbered(), 4, num_workers=2, in_order=False),
    "keys": lambda: DataLoader(Keys(), 4, sampler=list("cab")),
    "keys that are numbers": lambda: DataLoader(NumberedKeys(), 4, sampler=[902, 900, 901]),
    "no DataLoader": Batches,
    "filtered": lambda: DataLoader(Numbered(), 4, collate_fn=lambda rows: torch.utils.data.default_collate(rows[1:])),
}


@pytest.mark.parametrize("stage", ["test", "predict"])
@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_index_is_null_with_one_warning(kind: str, stage: str) -> None:
    data = UNKNOWN[kind]()
    callback = observed()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        getattr(trainer(callback), stage)(Indexed(), data)
    assert callback.results.num_rows >= 3 and set(callback.results["index"].to_pylist()) == {None}
    about = [str(one.message) for one in heard if "index of the rows" in str(one.message)]
    assert len(about) == 1 and "sample_id=" in about[0]


def test_loaders_side_by_side_are_one_dataset() -> None:
    class First(Stepped):
        def step(self, batch: Any) -> Any:
            return self(batch["a"][0])

    net, x, y = mlp(5, 8, 3), numbers(12, 5), torch.arange(12) % 3
    callback = lgm.GradientMetrics("energy")
    both = CombinedLoader({"a": batches(x, y), "b": batches(numbers(8, 5), torch.arange(8) % 2)}, "max_size_cycle")
    with pytest.warns(UserWarning, match="index of the rows"):
        trainer(callback).validate(First(net), both, verbose=False)
    assert callback.results["label"].to_pylist() == y.tolist()
    assert_scores(callback, net, x, ["energy"])
    assert column(callback, "energy").shape == (12,)


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
