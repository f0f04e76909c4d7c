"""Results that are evaluated batch by batch, in constant memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_gradmetrics.evaluation import Evaluation, evaluate, streams
from lightning_gradmetrics.evaluation.binned import bin_scores
from lightning_gradmetrics.meters.functional.bounds import CellEnds
from lightning_gradmetrics.meters.functional.histogram import append, empty_table
from lightning_gradmetrics.meters.functional.ranking import auroc, average_precision, fpr_at_tpr
from lightning_gradmetrics.results import IncompleteResultsError, read_results
from lightning_gradmetrics.results.parts import ResultsWriter, ResumeError
from lightning_gradmetrics.results.resuming import unfinished

SIZES = {"test": 12_000, "other": 5_000, "far": 4_000, "near": 3_000}
ROLES = {"test": "id", "other": "id", "far": "far", "near": "near"}
SCORES = ["max_softmax", "better", "few"]


def table(seed: int = 0, scale: float = 1.0) -> pa.Table:
    """Results with errors, unlabelled rows and rows that are not finite; "few" has 300 distinct values."""
    rng = np.random.default_rng(seed)
    sizes = {name: int(size * scale) for name, size in SIZES.items()}
    dataset = np.repeat(list(sizes), list(sizes.values()))
    size = len(dataset)
    wrong = (rng.random(size) < 0.15) & np.isin(dataset, ["test", "other"])
    signal = wrong + 1.5 * np.isin(dataset, ["far", "near"]) + rng.normal(size=size)
    better = signal + 0.3 * rng.normal(size=size)
    better[:5] = np.nan
    columns = {
        "dataset": dataset,
        "index": np.concatenate([rng.permutation(count) for count in sizes.values()]),
        "prediction": wrong.astype(int),
        "label": pa.array(np.zeros(size, dtype=int), mask=(dataset == "other") & (rng.random(size) < 0.2)),
        "max_softmax": signal + rng.normal(size=size),
        "better": better,
        "few": np.round(np.clip(signal + rng.normal(size=size), -1, 2), 2),
        "finite": np.isfinite(better),
    }
    return pa.table(columns)


def judged(results: Any, scores: list[str] = SCORES, **options: Any) -> Evaluation:
    return evaluate(results, scores, ROLES, ["max_softmax"], **options)


def write(directory: Path, results: pa.Table, sizes: dict[str, int] = SIZES) -> Path:
    with ResultsWriter(directory, {}, rows_per_part=5_000) as writer:
        for start in range(0, results.num_rows, 4_000):
            writer.add(results.slice(start, 4_000))
        writer.finish(sizes)
    return directory


def test_up_to_four_distinct_scores_per_bin_every_value_is_exact() -> None:
    few = ["max_softmax", "few"]
    results = table()
    results = results.set_column(4, "max_softmax", pc.round(results["max_softmax"], 1))
    wanted, found = judged(results, few, resamples=0), judged(results, few, resamples=0, bins=1024)
    assert len(found.metrics) == len(wanted.metrics) > 20 and found.datasets == wanted.datasets
    for one, other in zip(found.metrics, wanted.metrics, strict=True):
        assert one == {**other, "value": pytest.approx(other["value"], rel=1e-12)}
    (note,) = [note for note in found.notes if "bins" in note]
    assert note == (
        "scores are in 1024 bins: each AUROC is within 0 of its exact value, each FPR95 within 0, each AUPR within 0"
    )
    assert found.settings["bins"] == 1024 and wanted.settings["bins"] is None


KINDS_OF_SCORES = {
    "normal": lambda signal, rng: signal,
    "confident": lambda signal, rng: 1 / (1 + np.exp(-40 - 10 * signal)) - np.exp(-40 - 10 * signal),
    "heavy tails": lambda signal, rng: np.sinh(8 * signal),
    "mostly ties": lambda signal, rng: np.where(rng.random(len(signal)) < 0.7, np.round(signal), signal),
    "separate": lambda signal, rng: 100 * np.round(signal / 3) + signal,
}


@pytest.mark.parametrize("kind", KINDS_OF_SCORES)
def test_values_of_many_distinct_scores_are_within_the_stated_bounds(kind: str) -> None:
    results = table()
    rng = np.random.default_rng(3)
    for number in (4, 5):
        signal = results.column(number).to_numpy()
        values = KINDS_OF_SCORES[kind](signal, rng)
        results = results.set_column(number, results.column_names[number], pa.array(values))
    wanted, found = judged(results, resamples=0), judged(results, resamples=0, bins=1024)
    (note,) = [note for note in found.notes if "bins" in note]
    limits = [float(text.split()[0].rstrip(",")) for text in note.split("within ")[1:]]
    names = {"auroc": 0, "fpr95": 1, "aupr": 2, "aupr_in": 2}
    assert 0 < limits[0] < 0.02 and 0 < limits[1] < 0.05 and 0 < limits[2] < 0.05
    for one, other in zip(found.metrics, wanted.metrics, strict=True):
        limit = limits[names[one["metric"]]] if one["metric"] in names else 0.01
        assert one["value"] == pytest.approx(other["value"], abs=limit), one


@pytest.mark.parametrize("seed", range(20))
def test_the_bounds_of_random_cells_contain_every_order_of_their_samples(seed: int) -> None:
    """The samples of a small histogram are placed at random inside of their cells."""
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(np.round(rng.normal(size=300), int(rng.integers(1, 6))) * 10.0 ** rng.integers(-3, 4))
    target = torch.from_numpy(rng.integers(0, 2, 300))
    histogram = empty_table(16)
    for part in torch.arange(300).split(37):
        histogram = append(histogram, scores[part], target[part])
    ends = CellEnds.of(histogram)
    sides = ends.counts[0], ends.counts[1]
    bounds = {
        auroc: ends.auroc(*sides),
        fpr_at_tpr: ends.fpr(*sides),
        average_precision: ends.average_precision(*sides),
        _of_the_negatives: ends.average_precision_in(*sides),
    }
    for metric, (low, high) in bounds.items():
        assert low - 1e-6 <= metric(scores, target) <= high + 1e-6, metric  # values are float32


def _of_the_negatives(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return average_precision(scores, target, "in")


@pytest.mark.slow
def test_intervals_from_blocks_are_as_wide_as_those_from_rows() -> None:
    scores = ["max_softmax", "better"]
    wanted = judged(table(), scores, resamples=400)
    found = judged(table(), scores, resamples=400, bins=4096)
    assert found.settings["bootstrap"].startswith("blocks")
    ratios = []
    pairs = [*zip(found.metrics, wanted.metrics, strict=True), *zip(found.comparisons, wanted.comparisons, strict=True)]
    for one, other in pairs:
        assert one["low"] is not None and other["low"] is not None
        ratios.append((one["high"] - one["low"]) / (other["high"] - other["low"]))
    assert 0.9 < np.mean(ratios) < 1.1 and min(ratios) > 0.7 and max(ratios) < 1.4  # 256 blocks: 4 % noise of a width
    for one, other in zip(found.comparisons, wanted.comparisons, strict=True):
        assert one["difference"] == pytest.approx(other["difference"], abs=0.005)


@pytest.mark.parametrize("kind", ["directory", "dataset", "file"])
def test_every_kind_of_stream_is_evaluated_alike(kind: str, tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "all.parquet")
    given = {
        "directory": write(tmp_path / "results", table()),
        "dataset": ds.dataset(tmp_path / "all.parquet"),
        "file": tmp_path / "all.parquet",
    }
    wanted, found = judged(table(), resamples=20, bins=1024), judged(given[kind], resamples=20, bins=1024)
    for one, other in zip(found.metrics, wanted.metrics, strict=True):
        assert one["value"] == pytest.approx(other["value"], abs=2e-3) and one["dataset"] == other["dataset"]
    assert found.datasets == wanted.datasets


@pytest.mark.slow
def test_a_small_directory_is_exact_and_a_large_one_is_binned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write(tmp_path / "results", table())
    assert judged(directory, resamples=5) == judged(read_results(directory), resamples=5)
    monkeypatch.setattr("lightning_gradmetrics.evaluation.protocol.MOST_EXACT_ROWS", 20_000)
    assert judged(str(directory), resamples=0).settings["bins"] == 16_384


@pytest.mark.slow
def test_no_more_than_one_batch_of_rows_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state after the first pass has the same size for four times the rows."""
    monkeypatch.setattr("lightning_gradmetrics.results.stored.ROWS_PER_BATCH", 1_000)
    sizes = []
    for scale in (1.0, 4.0):
        wanted = {name: int(size * scale) for name, size in SIZES.items()}
        stream = streams.stream_of(write(tmp_path / str(scale), table(scale=scale), wanted))
        assert max(batch.num_rows for batch in stream.batches(SCORES)) == 1_000
        binned, _ = bin_scores(stream, SCORES, ROLES, 1024)
        sizes.append([one.table.numel() for one in binned.values()])
    assert sizes[0] == sizes[1]


def test_gaps_repetitions_and_interrupted_runs_are_refused(tmp_path: Path) -> None:
    results = table()
    repeated = pa.concat_tables([results, results.slice(9_000, 2)])
    with pytest.raises(IncompleteResultsError, match="has rows of 'test' more than once"):
        judged(write(tmp_path / "repeated", repeated), bins=1024)
    with pytest.raises(IncompleteResultsError, match="lacks rows of 'near'"):
        judged(write(tmp_path / "gap", results.slice(0, results.num_rows - 3)), bins=1024)
    directory = write(tmp_path / "interrupted", results)
    (directory / "_manifest.json").unlink()
    with pytest.raises(IncompleteResultsError, match="was interrupted after 24000 rows"):
        judged(directory, bins=1024)
    with pytest.raises(FileNotFoundError, match="contains no results"):
        judged(tmp_path / "nothing")


def test_mistakes_are_named(tmp_path: Path) -> None:
    directory = write(tmp_path / "results", table())
    for bins in (None, 1024):
        with pytest.raises(ValueError, match="no column 'entropy'; columns: dataset"):
            judged(directory, ["max_softmax", "entropy"], bins=bins)
        with pytest.raises(ValueError, match="no role for the datasets \\['near'\\]"):
            evaluate(directory, SCORES, {"test": "id", "other": "id", "far": "far"}, bins=bins)
    with pytest.raises(ValueError, match="bins must be None"):
        judged(directory, bins=3)
    with pytest.raises(ValueError, match="cluster= and bins= exclude each other"):
        judged(directory, bins=1024, cluster="index")


@pytest.mark.slow
def test_rows_without_an_index_are_evaluated(tmp_path: Path) -> None:
    results = table()
    hidden = results.set_column(1, "index", pa.nulls(results.num_rows, pa.int64()))
    directory = write(tmp_path / "results", hidden, dict.fromkeys(SIZES))
    wanted, found = judged(results, bins=1024, resamples=50), judged(directory, bins=1024, resamples=50)
    assert [one["value"] for one in found.metrics] == pytest.approx([one["value"] for one in wanted.metrics], abs=0.01)
    assert found.metrics[2]["low"] is not None


@pytest.mark.parametrize("bins", [None, 1024])
def test_digits_as_text_are_refused_and_decimals_and_categories_are_read(bins: int | None) -> None:
    results = table(scale=0.05)
    label = results["label"].cast(pa.string())
    with pytest.raises(ValueError, match="column 'label' contains values of type string; expected numbers"):
        judged(results.set_column(3, "label", label), bins=bins, resamples=0)
    expected = judged(results, bins=bins, resamples=0).metrics
    for same in (results["label"].cast(pa.decimal128(19, 0)), results["label"].dictionary_encode()):
        assert judged(results.set_column(3, "label", same), bins=bins, resamples=0).metrics == expected


@pytest.mark.parametrize("kind", ["text", "digits", "categories", "halves", "dates", "lists"])
def test_an_index_of_other_values_is_refused_everywhere(kind: str, tmp_path: Path) -> None:
    results = table(scale=0.05)
    names = [f"{number}.png" for number in range(results.num_rows)]
    columns = {
        "text": pa.array(names),
        "digits": pa.array(list(map(str, range(results.num_rows)))),
        "categories": pa.array(names).dictionary_encode(),
        "halves": pa.array(np.arange(results.num_rows) + 0.5),
        "dates": pa.array(np.arange(results.num_rows).astype("datetime64[D]")),
        "lists": pa.array([[number] for number in range(results.num_rows)]),
    }
    results = results.set_column(1, "index", columns[kind])
    directory = write(tmp_path / "results", results, dict.fromkeys(SIZES))
    calls = [
        lambda bins=bins, given=given: judged(given, bins=bins)
        for bins in (None, 1024)
        for given in (results, directory)
    ]
    loader = {"test": DataLoader(TensorDataset(torch.zeros(3)), 1)}
    for call in [*calls, lambda: read_results(directory), lambda: unfinished(loader, directory)]:
        with pytest.raises(ValueError, match=r"column 'index' contains values of type .* such as .*'sample_id'"):
            call()


def test_a_null_index_is_evaluated_and_a_run_without_it_is_not_resumed(tmp_path: Path) -> None:
    results = table(scale=0.05)
    directory = tmp_path / "results"
    described = {"t": {"kind": "Counted", "rows": 3, "order": "in order", "content": None}}
    for nulls in (pa.nulls(results.num_rows), pa.nulls(results.num_rows, pa.int64())):
        hidden = results.set_column(1, "index", nulls)
        assert judged(hidden, resamples=0).metrics == judged(results, resamples=0).metrics
        with ResultsWriter(directory, {"datasets": described}) as writer:
            writer.add(hidden.set_column(0, "dataset", pa.repeat("t", results.num_rows)))
        with pytest.raises(ResumeError, match="committed rows have no index"):
            unfinished(DataLoader(Counted(), 1), directory)
        shutil.rmtree(directory)


class Counted(Dataset[int]):
    """Three rows, whose content is unknown to a description of the data."""

    def __len__(self) -> int:
        return 3


def test_an_index_of_floats_with_gaps_is_read() -> None:
    """As pandas has it where some rows have no index."""
    results = table(scale=0.05)
    index = results["index"].cast(pa.float64())
    index = pc.if_else(pc.equal(index, 3.0), None, index)
    assert judged(results.set_column(1, "index", index), bins=1024, resamples=0).metrics
