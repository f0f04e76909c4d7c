"""The protocol: metrics from a results table, intervals, comparisons, statements."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch

import lightning_gradmetrics as lgm
from lightning_gradmetrics import meters
from lightning_gradmetrics.engine.kernels.library import plain_kernels
from lightning_gradmetrics.evaluation import (
    Evaluation,
    bootstrap,
    entries,
    evaluate,
    metrics,
    task_cells,
)
from lightning_gradmetrics.evaluation.cells import Cells, counts_of_task, make_cells, rank_rows
from lightning_gradmetrics.evaluation.metrics import TASKS, metrics_of
from lightning_gradmetrics.evaluation.protocol import compare_with_each
from lightning_gradmetrics.evaluation.statements import statements_of
from lightning_gradmetrics.evaluation.tasks import rows_of, tasks_of
from lightning_gradmetrics.meters import functional as F
from lightning_gradmetrics.meters.functional.counts import count

ROLES = {"test": "id", "mnist": "far", "textures": "far", "letters": "near"}
SIZES = {"test": 300, "mnist": 80, "textures": 60, "letters": 50}


def table(seed: int = 0, **changes: object) -> pa.Table:
    """Return results in which "good" detects errors and shifts, "fair" does so weakly, "noise" not at all; "twin" equals "fair"."""
    rng = np.random.default_rng(seed)
    dataset = np.repeat(list(SIZES), list(SIZES.values()))
    size = len(dataset)
    wrong = (rng.random(size) < 0.2) & (dataset == "test")
    signal = 1.5 * wrong + 1.5 * (dataset != "test") + rng.normal(size=size)
    columns = {
        "dataset": dataset,
        "index": np.concatenate([np.arange(n) for n in SIZES.values()]),
        "prediction": wrong.astype(int),
        "label": pa.array([0 if name == "test" else None for name in dataset], pa.int64()),
        "good": 100 * signal,
        "fair": np.round(signal + 2 * rng.normal(size=size), 1),
        "twin": 1e-30 * np.round(signal + 2 * rng.normal(size=size), 1),
        "noise": rng.normal(size=size) - 50,
        "finite": np.ones(size, dtype=bool),
    }
    columns["twin"] = 1e-30 * columns["fair"]
    return pa.table({**columns, **changes})


SCORES = ["good", "fair", "twin", "noise"]


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluate(table(), SCORES, ROLES, ["fair", "noise"], resamples=300)


def test_values_are_those_of_the_meters(evaluation):
    results = table()
    values = {name: torch.tensor(results[name].to_numpy()) for name in SCORES}
    names, wrong = np.asarray(results["dataset"].to_pylist()), torch.tensor(results["prediction"].to_numpy() == 1)
    meters = {
        "auroc": F.auroc,
        "aurc": F.aurc,
        "e_aurc": F.e_aurc,
        "augrc": F.augrc,
        "fpr95": F.fpr_at_tpr,
        "aupr": F.average_precision,
        "aupr_in": lambda s, t: F.average_precision(s, t, positive="in"),
    }
    inside = torch.tensor(names == "test")
    for score in SCORES:
        for metric in TASKS["misclassification"]:
            (record,) = evaluation.find(score=score, task="misclassification", metric=metric)
            assert (record["dataset"], record["group"]) == ("test", "id")
            assert record["value"] == pytest.approx(
                meters[metric](values[score][inside], wrong[inside]).item(), abs=1e-6
            )
            assert (record["count_positive"], record["count_negative"]) == (int(wrong.sum()), 300 - int(wrong.sum()))
        for dataset in ("mnist", "textures", "letters"):
            rows = inside | torch.tensor(names == dataset)
            for metric in TASKS["ood"]:
                (record,) = evaluation.find(score=score, task="ood", dataset=dataset, metric=metric)
                wanted = meters[metric](values[score][rows], (~inside)[rows]).item()
                assert record["value"] == pytest.approx(wanted, abs=1e-6)
                if metric != "fpr95" or dataset != "letters":
                    assert record["low"] <= record["value"] <= record["high"]


def test_the_joint_task_weights_ood_rows_to_the_stated_share(evaluation):
    results = table()
    scores = torch.tensor(results["good"].to_numpy())
    names, incorrect = np.asarray(results["dataset"].to_pylist()), results["prediction"].to_numpy() == 1
    inside = names == "test"
    for share, evaluated in ((0.5, evaluation), (0.2, evaluate(table(), ["good"], ROLES, resamples=0, ood_share=0.2))):
        weight = share / (1 - share) * 300 / 80
        rows = torch.tensor(inside | (names == "mnist"))
        weights = torch.tensor(np.where(inside, 1, weight))[rows]
        target = torch.tensor(~inside | incorrect)[rows]
        values = {
            entry["metric"]: entry["value"] for entry in evaluated.find(score="good", task="joint", dataset="mnist")
        }
        negative, positive = scores[rows][~target], scores[rows][target]
        above = (positive[:, None] > negative).double() + (positive[:, None] == negative).double() / 2
        auroc = (above.mean(1) * weights[target]).sum() / weights[target].sum()
        assert values["auroc"] == pytest.approx(auroc.item(), abs=1e-9)
        rate = (weights * target).sum() / weights.sum()
        assert rate == pytest.approx(share + (1 - share) * incorrect[inside].mean())
        # The identity of AUGRC and AUROC holds for weights too.
        assert values["augrc"] == pytest.approx((rate * (1 - rate) * (1 - auroc) + rate**2 / 2).item(), abs=1e-9)
        whole = torch.ones(len(target)) if weight == 1 else (weights * 4).round().long()
        repeated = F.aurc(scores[rows].repeat_interleave(whole), target.repeat_interleave(whole))
        assert values["aurc"] == pytest.approx(repeated.item(), abs=0.01)


def test_a_group_is_the_mean_of_its_sets(evaluation):
    for metric in TASKS["ood"]:
        (group,) = evaluation.find(score="good", task="ood", dataset=None, metric=metric)
        members = []
        for name in ("mnist", "textures"):
            members += evaluation.find(score="good", task="ood", dataset=name, metric=metric)
        assert group["group"] == "far"
        assert group["value"] == pytest.approx(np.mean([member["value"] for member in members]))
        assert (group["count_positive"], group["count_negative"]) == (140, 300)
        assert group["low"] < group["value"] < group["high"]
    # A group of one dataset equals that dataset.
    assert not [r for r in evaluation.metrics if r["group"] == "near" and r["dataset"] is None]


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


def test_comparison_says_better_worse_or_cannot_tell():
    evaluation = evaluate(table(), SCORES, ROLES, ["fair"], resamples=300)
    verdicts = {(c["score"], c["dataset"]): c["verdict"] for c in evaluation.comparisons if c["metric"] == "auroc"}
    assert verdicts["good", "test"] == "better"
    assert verdicts["noise", "mnist"] == "worse"
    twin = [c for c in evaluation.comparisons if c["score"] == "twin" and c["low"] is not None]
    assert all(c["verdict"] == "cannot tell" and c["low"] == c["high"] == c["difference"] == 0 for c in twin)
    sentence = next(s for s in evaluation.statements if s.startswith('Misclassification on "test"'))
    assert "fair has AUROC" in sentence
    assert sentence.index("Better: good") < sentence.index("worse: noise") < sentence.index("cannot tell: twin")
    assert "Better than every baseline, max-adjusted: good." in sentence
    assert sum("OOD detection" in s for s in evaluation.statements) == 4
    assert any('the mean over the group "far"' in s for s in evaluation.statements)


def test_statements_name_the_first_of_many_and_count_the_rest():
    shared = {"task": "ood", "dataset": "svhn", "group": "far", "metric": "auroc", "baseline": "energy"}
    values = {"baseline_value": 0.9, "verdict": "worse", "max_adjusted_verdict": "worse"}
    members = [
        {**shared, **values, "score": f"s{i}", "difference": -i / 100, "low": -i / 100 - 0.01, "high": -i / 100 + 0.01}
        for i in (9, 3, 2, 8, 5, 7, 4, 6)
    ]
    (sentence,) = statements_of(members, 0.95)
    assert "s2 (-2.0 [-3.0, -1.0]), s3 (" in sentence and "s8" not in sentence
    assert sentence.endswith("s7 (-7.0 [-8.0, -6.0]), and 2 more, down to s9 (-9.0 [-10.0, -8.0]) (95 % intervals).")
    (whole,) = statements_of(members[:7], 0.95)
    assert all(member["score"] in whole for member in members[:7]) and "more" not in whole


def test_differences_are_score_minus_baseline_and_the_verdict_knows_the_direction(evaluation):
    for c in evaluation.comparisons:
        assert c["baseline"] == "fair" and c["difference"] == c["value"] - c["baseline_value"]
        if (c["score"], c["dataset"], c["metric"]) == ("good", "mnist", "fpr95"):
            assert c["difference"] < 0 and c["high"] < 0 and c["verdict"] == "better"


def test_the_baseline_is_chosen_in_advance():
    results = table().append_column("max_softmax", table()["fair"])
    scores = [*SCORES, "max_softmax"]
    baselines = {c["baseline"] for c in evaluate(results, scores, ROLES, ["noise"], resamples=20).comparisons}
    assert baselines == {"max_softmax"}
    chosen = evaluate(results, scores, ROLES, ["noise"], baseline="good", resamples=20)
    assert {c["baseline"] for c in chosen.comparisons} == {"good"} and chosen.settings["baseline"] == "good"
    assert {c["baseline"] for c in evaluate(table(), SCORES, ROLES, ["noise"], resamples=20).comparisons} == {"noise"}
    without = evaluate(table(), SCORES, ROLES, resamples=20)
    assert not without.comparisons and any("no baseline" in note for note in without.notes)


def test_comparisons_with_several_scores_equal_one_evaluation_for_each() -> None:
    found = compare_with_each(table(), SCORES, ROLES, ["fair", "noise"], resamples=20)
    expected = []
    for baseline in ("fair", "noise"):
        expected += evaluate(table(), SCORES, ROLES, baseline=baseline, resamples=20).comparisons
    assert found == expected


def test_the_max_adjusted_verdict_is_biased_against_the_score():
    found = evaluate(table(), SCORES, ROLES, ["fair", "twin", "noise"], resamples=200)
    for c in found.comparisons:
        if c["score"] != "good":
            assert c["max_adjusted_verdict"] is None
        elif c["metric"] == "auroc":
            assert c["best_baseline"] in ("fair", "twin", "noise")
            assert c["max_adjusted_low"] <= c["low"] + 1e-9 and c["max_adjusted_high"] <= c["high"] + 1e-9


@pytest.mark.slow
def test_equal_scores_rarely_differ_significantly():
    rng = np.random.default_rng(0)
    worse = 0
    for seed in range(40):
        signal = np.repeat([0.0, 1.0], 150)
        columns = {f"s{i}": signal + rng.normal(size=300) for i in range(6)}
        base = {
            "dataset": ["test"] * 300,
            "index": np.arange(300),
            "prediction": signal.astype(int),
            "label": [0] * 300,
        }
        found = evaluate(pa.table({**base, **columns}), list(columns), {"test": "id"}, ["s1"], resamples=100, seed=seed)
        worse += sum(c["verdict"] != "cannot tell" for c in found.comparisons if c["metric"] == "auroc")
    assert worse <= 0.12 * 200


def test_notes_name_what_was_left_out():
    results = table()
    good = results["good"].to_numpy().copy()
    good[[0, 1, 310]] = np.nan, np.inf, np.nan
    finite = np.ones(len(results), dtype=bool)
    finite[2] = False
    found = evaluate(table(good=good, finite=finite), ["good", "fair"], ROLES, ["fair"], resamples=0)
    assert '3 of 300 rows of "test" are not finite and were dropped' in found.notes
    assert '1 of 80 rows of "mnist" are not finite and were dropped' in found.notes
    assert found.datasets[0]["not_finite"] == 3
    keep = np.ones(len(results), dtype=bool)
    keep[[0, 1, 2, 310]] = False
    clean = evaluate(results.filter(pa.array(keep)), ["good", "fair"], ROLES, ["fair"], resamples=0)
    assert clean.metrics == found.metrics
    assert any("resamples is 0" in note for note in found.notes)


def test_no_labels_and_one_class():
    nothing = pa.array([None] * len(table()), pa.int64())
    found = evaluate(table().set_column(3, "label", nothing), ["good"], ROLES, resamples=0)
    assert 'dataset "test" has no labels: misclassification is not evaluated' in found.notes
    assert {record["task"] for record in found.metrics} == {"ood"}
    assert found.datasets[0]["accuracy"] is None
    right = table().set_column(2, "prediction", pa.array([0] * len(table())))
    found = evaluate(right, ["good"], ROLES, ["good"], resamples=20)
    assert 'every prediction on "test" is correct: misclassification AUROC is undefined' in found.notes
    assert found.find(task="misclassification", metric="auroc")[0]["value"] is None
    assert found.find(task="misclassification", metric="aurc")[0]["value"] == 0
    some = pa.array([0] * 200 + [None] * (len(table()) - 200), pa.int64())
    found = evaluate(table().set_column(3, "label", some), ["good"], ROLES, resamples=0)
    assert '100 of 300 rows of "test" have no label: misclassification ignores them' in found.notes


def test_few_positives_and_missing_roles_are_noted():
    small = table().filter(pa.array(np.arange(len(table())) < 305))
    found = evaluate(small, ["good"], ROLES, ["good"], resamples=20)
    assert 'ood on "mnist" has 5 positive samples: no intervals below 10' in found.notes
    assert 'joint on "mnist" has 5 out-of-distribution samples: no intervals below 10' in found.notes
    assert all(entry["low"] is None for entry in found.find(task="ood", dataset="mnist"))
    assert all(c["verdict"] == "cannot tell" for c in found.comparisons if c["task"] == "ood")
    assert 'dataset "letters" has no rows and is not evaluated' in found.notes
    only = evaluate(small.slice(0, 300), ["good"], {"test": "id"}, resamples=0)
    assert any("no out-of-distribution rows" in note for note in only.notes)
    outside = evaluate(small.slice(300), ["good"], {"mnist": "far"}, resamples=0)
    assert any("no in-distribution rows" in note for note in outside.notes)
    assert outside.metrics == []


def test_find_names_unknown_keys_and_values(evaluation):
    with pytest.raises(ValueError, match="no metric has score='goood'; did you mean 'good'"):
        evaluation.find(score="goood")
    with pytest.raises(KeyError, match="unknown key 'scores'; did you mean 'score'"):
        evaluation.find(scores="good")
    assert evaluation.find(task="misclassification", dataset="mnist") == []
    assert evaluation.find(metric="aupr_in", task="misclassification") == []


def test_an_evaluation_has_a_repr_and_an_html_table(evaluation):
    assert len(repr(evaluation)) < 100 and "4 scores" in repr(evaluation)
    frame = evaluation.to_pandas()
    assert len(frame) == len(evaluation.metrics) and set(frame["score"]) == set(SCORES)
    page = evaluation._repr_html_()
    assert page.count("<tr>") == 1 + len(SCORES) and "AUROC" in page and "good" in page
    assert page.index("<th>errors:<br>") < page.index("<th>near:<br>") < page.index("<th>errors and near:<br>")


KINDS_OF_TABLE = {
    "pandas": lambda results, folder: results.to_pandas(),
    "record batches": lambda results, folder: results.to_batches(max_chunksize=50),
    "reader": lambda results, folder: results.to_reader(max_chunksize=50),
    "record batch": lambda results, folder: results.combine_chunks().to_batches()[0],
    "dataset": lambda results, folder: (pq.write_table(results, folder / "a.parquet"), ds.dataset(folder))[1],
    "dictionary": lambda results, folder: results.set_column(0, "dataset", results["dataset"].dictionary_encode()),
    "float32": lambda results, folder: results.set_column(5, "fair", results["fair"].cast(pa.float64())),
}


@pytest.mark.parametrize("kind", KINDS_OF_TABLE)
def test_every_common_kind_of_table_is_evaluated_alike(kind, tmp_path):
    wanted = evaluate(table(), SCORES, ROLES, ["fair"], resamples=10)
    assert evaluate(KINDS_OF_TABLE[kind](table(), tmp_path), SCORES, ROLES, ["fair"], resamples=10) == wanted


@pytest.mark.parametrize("results", [b"results.parquet", {"dataset": []}, [1, 2], 3])
def test_other_kinds_of_table_are_refused(results):
    with pytest.raises(TypeError, match="must be an Arrow table"):
        evaluate(results, ["good"], ROLES)


def test_repeated_rows_are_counted_in_any_order():
    order = np.random.default_rng(0).permutation(len(table()))
    shuffled = table().take(order)
    assert (
        evaluate(shuffled, ["good"], ROLES, resamples=0).metrics
        == evaluate(table(), ["good"], ROLES, resamples=0).metrics
    )
    with pytest.raises(ValueError, match="3 rows repeat"):
        evaluate(pa.concat_tables([shuffled, shuffled.slice(7, 3)]), ["good"], ROLES, resamples=0)


def test_a_registered_metric_appears_everywhere(monkeypatch):
    for name in ("METRICS", "TASKS", "SHOWN", "HIGHER_IS_BETTER"):
        monkeypatch.setattr(metrics, name, dict(getattr(metrics, name)))
    monkeypatch.setattr(entries, "TASKS", metrics.TASKS)

    def add() -> None:
        half = lambda counts, rate: counts.positives * 0 + 0.5  # noqa: E731
        lgm.evaluation.register_metric("aufc", "AUFC", "area", meters.AUFC, half, tasks=["ood"], shown=["ood"])

    add()
    found = evaluate(table(), ["good"], ROLES, resamples=0).find(score="good", dataset="mnist", task="ood")
    assert found[-1]["metric"] == "aufc" and found[-1]["value"] == 0.5 and metrics.HIGHER_IS_BETTER["aufc"]
    with pytest.raises(ValueError, match="is taken"):
        add()


def test_merged_cells_keep_every_metric(monkeypatch):
    rows, _ = rows_of(table(), SCORES, ROLES)
    tasks, _ = tasks_of(rows)
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


def test_compiled_totals_change_no_value(monkeypatch):
    results = table()
    with plain_kernels():
        expected = evaluate(results, ["good", "fair"], ROLES, resamples=0)
    monkeypatch.setattr("lightning_gradmetrics.evaluation.cells.MANY_SCORES", 1)
    found = evaluate(results, ["good", "fair"], ROLES, resamples=0)
    for entry, other in zip(found.metrics, expected.metrics, strict=True):
        assert entry == {**other, "value": pytest.approx(other["value"], rel=1e-12)}


def test_json_round_trip(evaluation):
    text = evaluation.to_json()
    assert Evaluation.from_dict(json.loads(text)) == evaluation
    assert "NaN" not in text


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"scores": ["good", "bad"]}, "no column 'bad'"),
        ({"scores": []}, "at least one column"),
        ({"scores": "good"}, "must be a list"),
        ({"roles": {"test": "id"}}, r"no role for the datasets \['letters', 'mnist', 'textures'\]"),
        ({"baselines": ["noise"]}, "not among the scores"),
        ({"baseline": "noise"}, "not among the scores"),
        ({"ood_share": 1}, "ood_share must be between"),
        ({"rate": 0}, "rate must be"),
        ({"level": 1.0}, "level must be between 0 and 1"),
        ({"resamples": -1}, "resamples must be"),
        ({"results": pa.concat_tables([table(), table()])}, "rows repeat a"),
        ({"results": table().drop_columns(["label"])}, "no column 'label'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error):
    with pytest.raises(ValueError, match=error):
        evaluate(**{"results": table(), "scores": ["good"], "roles": ROLES, **arguments})


@pytest.mark.slow
def test_progress_reaches_the_end():
    seen: list[float] = []
    evaluate(table(), ["good"], ROLES, resamples=5000, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert len(seen) > 1


@pytest.mark.parametrize("package", ["evaluation", "meters"])
def test_it_imports_neither_lightning_nor_hydra(package):
    root = Path(bootstrap.__file__).parents[1] / package
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"lightning", "hydra", "omegaconf"}, path
