"""Resamples, intervals, and the cells that large tables are resampled in."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch

from lightning_gradmetrics.engine.kernels.library import plain_kernels
from lightning_gradmetrics.evaluation import (
    bootstrap,
    evaluate,
    metrics,
    task_cells,
    totals,
)
from lightning_gradmetrics.evaluation.cells import Cells, counts_of_task, make_cells, rank_rows
from lightning_gradmetrics.evaluation.metrics import TASKS, metrics_of
from lightning_gradmetrics.evaluation.tasks import rows_of, tasks_of
from lightning_gradmetrics.meters.functional.counts import count
from tests.evaluation.tables import ROLES, SCORES, table


@pytest.mark.parametrize("method", ["exact", "poisson"])
def test_replicates_are_metrics_of_resampled_rows(method, monkeypatch):
    monkeypatch.setattr(bootstrap, "EXACT_ROWS", 10**6 if method == "exact" else 0)
    rows, _ = rows_of(table(), SCORES, ROLES)
    tasks, _ = tasks_of(rows)
    tasks = [task for task in tasks if task.task != "joint"]
    most = bootstrap.most_cells(len(rows.codes))
    cells = {}
    for score in SCORES:
        cells[score] = make_cells(rank_rows(rows, score), most, tasks)
    drawn = bootstrap.replicate(rows, cells, tasks, 0.95, 3, 4, {})
    ((_, weights),) = bootstrap.weight_blocks(rows, 3, 4)
    for task in tasks:
        for score in SCORES:
            for b in range(3):
                mask = torch.isin(rows.codes.long(), torch.tensor((*task.negative, *task.positive)))
                times = weights[mask, b].long()
                target = torch.isin(rows.codes.long(), torch.tensor(task.positive))[mask]
                scores = rows.scores[score][mask].repeat_interleave(times)
                counts = count(scores, target.repeat_interleave(times))
                for metric, value in metrics_of(TASKS[task.task], counts, 0.95).items():
                    found = drawn[(task.task, task.dataset, task.group, score, metric)][b]
                    torch.testing.assert_close(found, value.double(), atol=1e-9, rtol=1e-9)


def test_resampling_with_replacement_keeps_sizes_and_poisson_weights_have_mean_and_variance_one(monkeypatch):
    rows, _ = rows_of(table(), ["good"], ROLES)
    ((_, exact),) = bootstrap.weight_blocks(rows, 50, 0)
    for start, stop in ((0, 300), (300, 380), (380, 440), (440, 490)):
        assert (exact[start:stop].sum(0) == stop - start).all()
    monkeypatch.setattr(bootstrap, "EXACT_ROWS", 0)
    ((_, poisson),) = bootstrap.weight_blocks(rows, 64, 0)
    assert poisson.mean().item() == pytest.approx(1, abs=0.02)
    assert poisson.var().item() == pytest.approx(1, abs=0.05)
    table_of_weights = bootstrap.POISSON
    assert table_of_weights.mean() == 1 and table_of_weights.var() == pytest.approx(1, abs=1e-3)


def large(size: int = 30_000) -> tuple[pa.Table, dict[str, str]]:
    rng = np.random.default_rng(0)
    half = size // 2
    is_ood = np.arange(size) >= half
    incorrect = (rng.random(size) < 0.1) & ~is_ood
    noise = rng.normal(size=(2, size))
    columns = {
        "dataset": np.where(is_ood, "far", "test"),
        "index": np.arange(size),
        "prediction": incorrect.astype(int),
        "label": np.zeros(size, dtype=int),
        "one": incorrect + 2.5 * is_ood + noise[0],
        "two": np.round(incorrect + 2.0 * is_ood + noise[0] + 0.5 * noise[1], 2).astype(np.float32),
    }
    return pa.table(columns), {"test": "id", "far": "far"}


def class_counts(cells: Cells, weights: torch.Tensor) -> torch.Tensor:
    """Return the counts ``(C, B, K)`` of every class and cell."""
    counts = torch.zeros(*cells.present.shape, weights.shape[1], dtype=torch.float64)
    counts[cells.present] = cells.counts(weights)
    return counts.transpose(1, 2)


@pytest.mark.slow
def test_cells_agree_with_the_exact_bootstrap_on_the_same_weights():
    results, roles = large()
    rows, _ = rows_of(results, ["one", "two"], roles)
    tasks, _ = tasks_of(rows)
    _, weights = next(bootstrap.weight_blocks(rows, 64, 0))
    ones = torch.ones(len(rows.codes), 1)
    for score in ("one", "two"):
        ranked = rank_rows(rows, score)
        few = make_cells(ranked, bootstrap.CELLS, tasks)
        every = make_cells(ranked, len(rows.codes))
        assert len(few.scores) < 2 * bootstrap.CELLS
        for task in tasks:
            found, wanted, shift = {}, {}, {}
            for name, cells, drawn in ((found, few, weights), (wanted, every, weights), (shift, few, ones)):
                name |= metrics_of(
                    TASKS[task.task], counts_of_task(task, cells.scores, class_counts(cells, drawn)), 0.95
                )
            exact = metrics_of(TASKS[task.task], counts_of_task(task, every.scores, class_counts(every, ones)), 0.95)
            for metric in found:
                error = (found[metric] - shift[metric] + exact[metric] - wanted[metric]).abs().max()
                assert error <= (0.15 if metric == "fpr95" else 0.03) * wanted[metric].std(), (task.task, metric)


def test_the_method_is_chosen_by_size_and_named():
    results, roles = large()
    few = evaluate(results.slice(13_000, 4_000), ["one"], roles, resamples=2)
    many = evaluate(results, ["one"], roles, resamples=2)
    assert few.settings["bootstrap"].startswith("exact")
    assert many.settings["bootstrap"].startswith("poisson") and str(bootstrap.CELLS) in many.settings["bootstrap"]
    assert evaluate(results, ["one"], roles, resamples=0).settings["bootstrap"] is None


@pytest.mark.slow
def test_intervals_are_repeatable_and_leave_the_global_seed_alone(evaluation):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = evaluate(table(), SCORES, ROLES, ["fair", "noise"], resamples=300)
    assert torch.equal(torch.get_rng_state(), state)
    assert again == evaluation
    other_seed = evaluate(table(), SCORES, ROLES, ["fair", "noise"], resamples=300, seed=1)
    ends = [entry.find(task="misclassification", metric="aurc")[0]["low"] for entry in (evaluation, other_seed)]
    assert ends[0] != ends[1]


@pytest.mark.slow
def test_intervals_cover():
    # The AUROC of two normal distributions with means one apart is Phi(1 / sqrt 2) = 0.7602: 90 % intervals should hold it 90 times of 100.
    held = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        inside, outside = rng.normal(size=150), rng.normal(size=100) + 1
        columns = {
            "dataset": ["test"] * 150 + ["far"] * 100,
            "index": np.arange(250),
            "prediction": np.zeros(250, int),
            "label": pa.array([None] * 250, pa.int64()),
            "score": np.concatenate([inside, outside]),
        }
        found = evaluate(
            pa.table(columns), ["score"], {"test": "id", "far": "far"}, resamples=200, level=0.9, seed=seed
        )
        (record,) = found.find(metric="auroc")
        held += record["low"] <= 0.7602 <= record["high"]
    assert 80 <= held <= 98


def test_merged_cells_keep_every_metric(monkeypatch):
    rows, _ = rows_of(table(), SCORES, ROLES)
    tasks, _ = tasks_of(rows)
    monkeypatch.setattr(bootstrap, "has_kernel", bool)
    cells = {}
    for score in SCORES:  # "fair" has ties of positives and negatives
        cells[score] = make_cells(rank_rows(rows, score), len(rows.codes), tasks)
    merged = bootstrap.replicate(rows, cells, tasks, 0.95, 10, 0, {})
    separate = {}
    for name, metric in metrics.METRICS.items():
        separate[name] = dataclasses.replace(metric, reads="all")
    monkeypatch.setattr(task_cells, "METRICS", separate)
    unmerged = bootstrap.replicate(rows, cells, tasks, 0.95, 10, 0, {})
    assert merged.keys() == unmerged.keys()
    for key, values in unmerged.items():
        torch.testing.assert_close(merged[key], values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rate", [0.95, 1.0, 1e-17])
@pytest.mark.parametrize("method", ["exact", "poisson"])
def test_the_kernel_changes_no_replicate(method, rate, monkeypatch):
    monkeypatch.setattr(bootstrap, "EXACT_ROWS", 10**6 if method == "exact" else 0)
    monkeypatch.setattr(bootstrap, "CELLS", 50)
    monkeypatch.setattr(bootstrap, "FEWEST_FOR_KERNEL", 0)
    monkeypatch.setattr(totals, "TABLE_LIMIT", 1024)
    kinds = np.arange(490) % 7 == 0  # some digits without a label, and a dataset whose few errors some resamples lack
    labels = pa.array([None if kind else int(number >= 298) for number, kind in enumerate(kinds)], pa.int64())
    results = table(label=labels, prediction=np.zeros(490, dtype=int))
    rows, _ = rows_of(results, SCORES, ROLES)
    tasks, _ = tasks_of(rows, 0.9)  # weighted, ten times as many samples: beyond the table of harmonic numbers
    cells = {}
    for score in SCORES:
        cells[score] = make_cells(rank_rows(rows, score), bootstrap.most_cells(len(rows.codes)), tasks, rate)
    exact = dict.fromkeys([("joint", "mnist", "far", "good", "aurc")], 0.5)
    fast = bootstrap.replicate(rows, cells, tasks, rate, 70, 0, exact)
    with plain_kernels():
        plain = bootstrap.replicate(rows, cells, tasks, rate, 70, 0, exact)
    assert fast.keys() == plain.keys()
    for key, values in plain.items():
        torch.testing.assert_close(fast[key], values, rtol=1e-11, atol=1e-12, equal_nan=True)
    for task, dataset, group, score, metric in fast:  # scores of the same order have the same replicates
        if score == "fair":
            twin = fast[task, dataset, group, "twin", metric]
            torch.testing.assert_close(fast[task, dataset, group, score, metric], twin, rtol=0, atol=0, equal_nan=True)


def test_weights_of_many_tied_rows_are_summed_exactly(monkeypatch):
    monkeypatch.setattr("lightning_gradmetrics.evaluation.cells.MOST_SUMMED", 1)
    order, starts = torch.tensor([1, 0, 2, 3, 4], dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
    cells = Cells(torch.zeros(1), order, torch.ones(2, 1, dtype=torch.bool), starts)
    weights = torch.tensor([[1.0], [2.0**24], [1], [1], [5]])  # in float32, 2^24 + 1 is 2^24
    assert cells.counts(weights).tolist() == [[2**24 + 3], [5]]


def test_a_registered_metric_is_resampled_beside_the_kernel(monkeypatch):
    monkeypatch.setattr(bootstrap, "FEWEST_FOR_KERNEL", 0)
    own = dataclasses.replace(metrics.METRICS["aurc"], name="own", totals=False)
    monkeypatch.setitem(metrics.METRICS, "own", own)
    monkeypatch.setitem(TASKS, "joint", (*TASKS["joint"], "own"))
    rows, _ = rows_of(table(), ["fair"], ROLES)
    tasks, _ = tasks_of(rows)
    cells = {"fair": make_cells(rank_rows(rows, "fair"), len(rows.codes), tasks)}
    found = bootstrap.replicate(rows, cells, tasks, 0.95, 9, 0, {})
    joint = "joint", "mnist", "far", "fair"
    torch.testing.assert_close(found[(*joint, "own")], found[(*joint, "aurc")], rtol=1e-12, atol=0)


def test_compiled_totals_change_no_value(monkeypatch):
    results = table()
    with plain_kernels():
        expected = evaluate(results, ["good", "fair"], ROLES, resamples=0)
    monkeypatch.setattr("lightning_gradmetrics.evaluation.cells.MANY_SCORES", 1)
    found = evaluate(results, ["good", "fair"], ROLES, resamples=0)
    for entry, other in zip(found.metrics, expected.metrics, strict=True):
        assert entry == {**other, "value": pytest.approx(other["value"], rel=1e-12)}
