"""The per-sample table."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_gradmetrics.results.finite import finite_rows
from lightning_gradmetrics.results.rows import Rows, empty_results
from lightning_gradmetrics.results.sample_index import SampleIndex, sample_indices
from lightning_gradmetrics.results.table import merge_results


def add(rows: Rows, n: int, labels: torch.Tensor | None = None) -> None:
    rows.add(rows.index.take(n), torch.randn(n, 2), torch.randn(n, 3), labels, {"s": torch.arange(float(n))})


@pytest.mark.parametrize("size", [5, 6, 7])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_sample_occurs_once_over_all_processes(size: int, world: int) -> None:
    dataset, tables = TensorDataset(torch.arange(size)), []
    for rank in range(world):
        loader = DataLoader(dataset, 2, sampler=DistributedSampler(dataset, world, rank, shuffle=False))
        rows = Rows("d", ["s"], SampleIndex.of(loader, rank, world))
        for (batch,) in loader:
            index = rows.index.take(len(batch))
            rows.add(index, batch.float()[:, None], torch.zeros(len(batch), 3), batch, {"s": batch.float()})
        tables.append(rows.table())
    merged = merge_results(tables, ["d"])
    assert merged["index"].to_pylist() == merged["label"].to_pylist() == list(range(size))
    assert merged["s"].to_pylist() == [float(i) for i in range(size)]


def test_a_shuffled_distributed_sampler_gives_true_indices() -> None:
    dataset = TensorDataset(torch.arange(9))
    loader = DataLoader(dataset, 2, sampler=DistributedSampler(dataset, 2, 1, shuffle=True, seed=4))
    seen = torch.cat([batch for (batch,) in loader]).tolist()
    known = sample_indices(loader, 1, 2)
    assert [i for i in known if i >= 0] == [s for s, i in zip(seen, known, strict=True) if i >= 0]
    assert (known == -1).sum() == 1


def test_unknown_orders() -> None:
    assert sample_indices(DataLoader(TensorDataset(torch.arange(4)), shuffle=True)) is None
    assert sample_indices([1, 2, 3]) is None
    batches = [[3, 1], [0, 2]]
    assert list(sample_indices(DataLoader(TensorDataset(torch.arange(4)), batch_sampler=batches))) == [3, 1, 0, 2]
    from_the_end = DataLoader(TensorDataset(torch.arange(4)), batch_sampler=[[-1, -2], [0]])
    assert list(sample_indices(from_the_end)) == [3, 2, 0]
    for keys in ([["a", "b"]], [[(0, 1)]], [[0.5]], [[900, 901]]):
        assert sample_indices(DataLoader(TensorDataset(torch.arange(4)), batch_sampler=keys)) is None


def test_labels_and_order_of_datasets() -> None:
    first, second = Rows("b", ["s"]), Rows("a", ["s"])
    add(first, 2, torch.tensor([1, -1]))
    add(second, 3)
    merged = merge_results([second.table(), first.table()], ["b", "a"])
    assert merged["dataset"].to_pylist() == ["b", "b", "a", "a", "a"]
    assert merged["label"].to_pylist() == [1, None, None, None, None]
    assert merge_results([empty_results(["s"])], ["b"]).num_rows == 0


def test_finite_rows() -> None:
    inputs = {"x": torch.ones(4, 2, 2), "ids": torch.ones(4, dtype=torch.long), "scale": torch.tensor(float("nan"))}
    inputs["x"][1, 0, 1] = float("nan")
    score = torch.tensor([0.0, 0.0, float("inf"), 0.0])
    assert finite_rows(inputs, [score], 4).tolist() == [True, False, False, True]
    assert finite_rows({"ids": torch.ones(2, dtype=torch.long)}, [], 2).tolist() == [True, True]
    assert finite_rows(torch.ones(3, 2), [torch.ones(0, 3), torch.ones(0)], 0).tolist() == []
    assert finite_rows(torch.tensor([[1j], [complex(0, torch.inf)]]), [], 2).tolist() == [True, False]
