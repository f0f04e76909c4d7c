"""Datasets that return the index of a sample, and loaders of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
)

import lightning_gradmetrics as lgm
from tests.callback.runs import Stepped, mlp

EXPECTED_WARNINGS = [
    pytest.mark.filterwarnings("ignore:Your .*'s sampler has shuffling enabled"),
    pytest.mark.filterwarnings("ignore:.*(persistent_workers|have many workers)"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode|You are using a custom batch sampler"),
    pytest.mark.filterwarnings("ignore:[0-9]+ dataloaders and no roles"),
]


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
