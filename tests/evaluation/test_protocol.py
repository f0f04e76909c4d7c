"""The protocol: metrics from a results table, intervals, comparisons, words, thresholds."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from lightning_gradmetrics.evaluation import (
    Evaluation,
    Thresholds,
    apply_thresholds,
    bootstrap,
    evaluate,
    fit_thresholds,
)
from lightning_gradmetrics.evaluation.comparisons import statements_of
from lightning_gradmetrics.evaluation.metrics import TASKS, metrics_of
from lightning_gradmetrics.evaluation.tasks import rows_of, tasks_of
from lightning_gradmetrics.meters import functional as F
from lightning_gradmetrics.meters.functional.counts import count

ROLES = {"test": "id", "mnist": "far", "textures": "far", "letters": "near"}
SIZES = {"test": 300, "mnist": 80, "textures": 60, "letters": 50}


def table(seed: int = 0, **changes: object) -> pa.Table:
    """Results where "good" finds errors and shifts, "fair" a little, "noise" nothing, "twin" is "fair" again."""
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
                assert record["low"] <= record["value"] <= record["high"]


def test_a_group_is_the_mean_of_its_sets(evaluation):
    for metric in TASKS["ood"]:
        (group,) = evaluation.find(score="good", task="ood", dataset=None, metric=metric)
        members = [evaluation.find(score="good", dataset=name, metric=metric)[0] for name in ("mnist", "textures")]
        assert group["group"] == "far"
        assert group["value"] == pytest.approx(np.mean([member["value"] for member in members]))
        assert (group["count_positive"], group["count_negative"]) == (140, 300)
        assert group["low"] < group["value"] < group["high"]
    # The group of one set is that set.
    assert not [r for r in evaluation.metrics if r["group"] == "near" and r["dataset"] is None]


def test_replicates_are_metrics_of_resampled_rows():
    rows, _ = rows_of(table(), SCORES, ROLES)
    tasks, _ = tasks_of(rows)
    drawn = bootstrap.replicate(rows, tasks, SCORES, 0.95, 3, seed=4)
    # The same draws, repeated by hand: rows taken as often as their weight says.
    ((_, weights),) = bootstrap._blocks({name: len(part) for name, part in rows.items()}, 3, 4)
    for task in tasks:
        for score in SCORES:
            for b in range(3):
                times = task.weights(weights)[b].long()
                assert times.sum() == len(task.target)
                scores = task.values(rows, score).repeat_interleave(times)
                counts = count(scores, task.target.repeat_interleave(times))
                for metric, value in metrics_of(task.task, counts, 0.95).items():
                    found = drawn[(task.task, task.dataset, task.group, score, metric)][b]
                    torch.testing.assert_close(found, value.double(), atol=1e-5, rtol=1e-5)


def test_intervals_do_not_depend_on_blocks_or_global_seed(evaluation, monkeypatch):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    monkeypatch.setattr(bootstrap, "ELEMENTS", 2000)
    again = evaluate(table(), SCORES, ROLES, ["fair", "noise"], resamples=300)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(again.metrics, evaluation.metrics, strict=True):
        assert one == pytest.approx(other, abs=1e-6) if one["low"] is None else True
        assert (one["low"], one["high"]) == pytest.approx((other["low"], other["high"]), abs=1e-6)
    other_seed = evaluate(table(), SCORES, ROLES, ["fair", "noise"], resamples=300, seed=1)
    assert other_seed.metrics[0]["low"] != evaluation.metrics[0]["low"]


@pytest.mark.slow
def test_intervals_cover():
    # The AUROC of two normals one apart is Phi(1 / sqrt 2) = 0.7602: 90 % intervals should hold it 90 times of 100.
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
    twin = [c for c in evaluation.comparisons if c["score"] == "twin"]
    assert all(c["verdict"] == "cannot tell" and c["low"] == c["high"] == c["difference"] == 0 for c in twin)
    sentence = next(s for s in evaluation.statements if s.startswith('Misclassification on "test"'))
    assert "the best baseline is fair" in sentence
    assert (
        sentence.index("Better than") < sentence.index("good") < sentence.index("worse than") < sentence.index("noise")
    )
    assert "cannot tell: twin" in sentence
    assert sum("Out-of-distribution" in s for s in evaluation.statements) == 4
    assert any('the mean over the group "far"' in s for s in evaluation.statements)


def test_sentences_name_the_first_of_many_and_count_the_rest():
    shared = {"task": "ood", "dataset": "svhn", "group": "far", "metric": "auroc", "baseline": "energy"}
    values = {"baseline_value": 0.9, "verdict": "worse"}
    members = [
        {**shared, **values, "score": f"s{i}", "difference": -i / 100, "low": -i / 100 - 0.01, "high": -i / 100 + 0.01}
        for i in (9, 3, 2, 8, 5, 7, 4, 6)
    ]
    (sentence,) = statements_of(members, 0.95)
    assert "s2 (-2.0 [-3.0, -1.0]), s3 (" in sentence and "s8" not in sentence
    assert sentence.endswith("s7 (-7.0 [-8.0, -6.0]), and 2 more, down to s9 (-9.0 [-10.0, -8.0]) (95 % intervals).")
    (whole,) = statements_of(members[:7], 0.95)
    assert all(member["score"] in whole for member in members[:7]) and "more" not in whole


def test_differences_are_signed_so_that_more_is_better(evaluation):
    for comparison in evaluation.comparisons:
        if comparison["score"] == "good" and comparison["dataset"] == "mnist":
            assert comparison["difference"] > 0
            assert comparison["baseline"] == "fair"


def test_best_baseline_is_chosen_in_each_resample():
    one = evaluate(table(), SCORES, ROLES, ["fair"], resamples=200)
    both = evaluate(table(), SCORES, ROLES, ["fair", "twin", "noise"], resamples=200)
    for a, b in zip(
        [c for c in one.comparisons if c["score"] == "good"],
        [c for c in both.comparisons if c["score"] == "good"],
        strict=True,
    ):
        assert b["low"] <= a["low"] + 1e-9
        assert b["high"] <= a["high"] + 1e-9


def test_notes_name_what_was_left_out():
    results = table()
    good = results["good"].to_numpy().copy()
    good[[0, 1, 310]] = np.nan, np.inf, np.nan
    finite = np.ones(len(results), dtype=bool)
    finite[2] = False
    found = evaluate(table(good=good, finite=finite), ["good", "fair"], ROLES, ["fair"], resamples=0)
    assert '3 of 300 rows of "test" are not finite and were left out' in found.notes
    assert '1 of 80 rows of "mnist" are not finite and were left out' in found.notes
    assert found.datasets[0]["not_finite"] == 3
    keep = np.ones(len(results), dtype=bool)
    keep[[0, 1, 2, 310]] = False
    clean = evaluate(results.filter(pa.array(keep)), ["good", "fair"], ROLES, ["fair"], resamples=0)
    assert clean.metrics == found.metrics
    assert any("no resamples" in note for note in found.notes)


def test_no_labels_and_one_class():
    nothing = pa.array([None] * len(table()), pa.int64())
    found = evaluate(table().set_column(3, "label", nothing), ["good"], ROLES, resamples=0)
    assert 'data set "test" has no labels: misclassification is left out' in found.notes
    assert {record["task"] for record in found.metrics} == {"ood"}
    assert found.datasets[0]["accuracy"] is None
    right = table().set_column(2, "prediction", pa.array([0] * len(table())))
    found = evaluate(right, ["good"], ROLES, ["good"], resamples=20)
    assert 'every prediction on "test" is correct: misclassification AUROC is undefined' in found.notes
    assert found.find(task="misclassification", metric="auroc")[0]["value"] is None
    assert found.find(task="misclassification", metric="aurc")[0]["value"] == 0
    some = pa.array([0] * 200 + [None] * (len(table()) - 200), pa.int64())
    found = evaluate(table().set_column(3, "label", some), ["good"], ROLES, resamples=0)
    assert '100 of 300 rows of "test" have no label: misclassification leaves them out' in found.notes


def test_few_positives_and_missing_roles_are_noted():
    small = table().filter(pa.array(np.arange(len(table())) < 305))
    found = evaluate(small, ["good"], ROLES, ["good"], resamples=20)
    assert 'only 5 positive samples for ood on "mnist": intervals are rough' in found.notes
    assert 'data set "letters" has no rows: it is left out' in found.notes
    only = evaluate(small.slice(0, 300), ["good"], {"test": "id"}, resamples=0)
    assert any("no out-of-distribution rows" in note for note in only.notes)
    outside = evaluate(small.slice(300), ["good"], {"mnist": "far"}, resamples=0)
    assert any("no in-distribution rows" in note for note in outside.notes)
    assert outside.metrics == []


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
        ({"roles": {"test": "id"}}, r"no role for the data sets \['letters', 'mnist', 'textures'\]"),
        ({"baselines": ["noise"]}, "not among the scores"),
        ({"rate": 0}, "rate must be"),
        ({"level": 1.0}, "level must be below 1"),
        ({"resamples": -1}, "resamples must be"),
        ({"results": pa.concat_tables([table(), table()])}, "rows repeat a"),
        ({"results": table().drop_columns(["label"])}, "no column 'label'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error):
    with pytest.raises(ValueError, match=error):
        evaluate(**{"results": table(), "scores": ["good"], "roles": ROLES, **arguments})


def test_progress_reaches_the_end():
    seen: list[float] = []
    evaluate(table(), ["good"], ROLES, resamples=5000, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert len(seen) > 1


def test_thresholds_accept_the_share_they_were_fitted_for():
    results = table()
    inside = results.slice(0, 300)
    for tpr in (0.5, 0.95, 1.0):
        thresholds = fit_thresholds(inside, SCORES, tpr)
        assert thresholds.rows == 300
        accepted = apply_thresholds(inside, thresholds)
        for score in SCORES:
            values, accept = inside[score].to_numpy(), accepted[f"{score}_accept"].to_numpy()
            assert accept.mean() >= tpr
            # A lower threshold would accept too few.
            assert (values < thresholds.values[score]).mean() < tpr


def test_thresholds_survive_json_exactly_and_reject_what_is_not_finite():
    thresholds = fit_thresholds(table().slice(0, 300), ["good", "twin"])
    again = Thresholds.from_json(thresholds.to_json())
    assert again == thresholds
    good = table()["good"].to_numpy().copy()
    good[:2] = -1e9, np.nan
    finite = np.arange(len(good)) != 2
    accepted = apply_thresholds(table(good=good, finite=finite), again)
    assert accepted["good_accept"].to_pylist()[:3] == [True, False, False]
    assert apply_thresholds(accepted, again).column_names == accepted.column_names
    with pytest.raises(ValueError, match="no thresholds"):
        Thresholds.from_json("{}")
    with pytest.raises(ValueError, match="no column 'good'"):
        apply_thresholds(table().drop_columns(["good"]), again)
    with pytest.raises(ValueError, match="no row of the results is finite"):
        fit_thresholds(table(finite=np.zeros(len(good), dtype=bool)), ["good"])
    with pytest.raises(ValueError, match="tpr must be"):
        fit_thresholds(table(), ["good"], tpr=0)


@pytest.mark.parametrize("package", ["evaluation", "meters"])
def test_it_imports_neither_lightning_nor_hydra(package):
    root = Path(bootstrap.__file__).parents[1] / package
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"lightning", "hydra", "omegaconf"}, path
