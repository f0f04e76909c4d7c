"""The column ``index``: the index in the dataset of each row, or null with one warning; checked by a dataset that returns it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)

import lightning_gradmetrics as lgm
from tests.callback.image_runs import STAGES
from tests.callback.indexed import (
    EXPECTED_WARNINGS,
    LOADERS,
    Batches,
    Indexed,
    Numbered,
    assert_exact,
    numbers_received,
    observed,
)
from tests.callback.runs import Stepped, assert_scores, batches, column, mlp, numbers, trainer
from tests.models import fast_rows

pytestmark = EXPECTED_WARNINGS


class Reused(Sampler[list[int]]):
    """Yields the same list object repeatedly, draws random numbers when a pass starts, and has no length."""

    def __iter__(self) -> Iterator[list[int]]:
        return self.generate(torch.randperm(11).tolist())

    def generate(self, order: list[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        while order:
            batch[:] = [order.pop() for _ in range(min(3, len(order)))]
            yield batch


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
