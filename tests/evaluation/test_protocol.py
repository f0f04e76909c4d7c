"""The protocol: metrics from a results table, its forms, notes and errors."""

from __future__ import annotations

import ast
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
from lightning_gradmetrics import meters as M
from lightning_gradmetrics.evaluation import (
    Evaluation,
    bootstrap,
    entries,
    evaluate,
    metrics,
)
from lightning_gradmetrics.evaluation.metrics import HIGHER_IS_BETTER, TASKS
from lightning_gradmetrics.meters import functional as F
from tests.evaluation.tables import ROLES, SCORES, table


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


def test_directions_are_those_of_the_meters():
    of_metric = {"auroc": M.AUROC, "aurc": M.AURC, "e_aurc": M.EAURC, "augrc": M.AUGRC, "fpr95": M.FPRAtTPR}
    of_metric |= dict.fromkeys(["aupr", "aupr_in"], M.AveragePrecision)
    assert {name: meter.higher_is_better for name, meter in of_metric.items()} == HIGHER_IS_BETTER


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


def test_negative_labels_are_unknown_unless_predictions_are_negative():
    rows = len(table())
    unknown = evaluate(
        table(label=pa.array([0] * 200 + [None] * (rows - 200), pa.int64())), ["good"], ROLES, resamples=0
    )
    negative = table(label=pa.array([0] * 200 + [-1] * (rows - 200), pa.int64()))
    for bins in (None, 1024):
        found = evaluate(negative, ["good"], ROLES, resamples=0, bins=bins)
        assert '100 of 300 rows of "test" have no label: misclassification ignores them' in found.notes
        assert found.datasets == unknown.datasets
    assert evaluate(negative, ["good"], ROLES, resamples=0).metrics == unknown.metrics
    signs = table(label=np.full(rows, -1), prediction=2 * table()["prediction"].to_numpy() - 1)
    assert (
        evaluate(signs, ["good"], ROLES, resamples=0).metrics == evaluate(table(), ["good"], ROLES, resamples=0).metrics
    )
    both = pa.concat_tables([negative, signs.set_column(1, "index", pa.array(np.arange(rows) + rows))])
    with pytest.raises(ValueError, match="unknown whether these labels are classes"):
        evaluate(both, ["good"], ROLES, resamples=0, bins=1024)


def test_columns_of_other_types_are_read_alike():
    plain = table(index=pa.nulls(len(table()), pa.int64()))
    other = table(index=pa.nulls(len(table())), finite=np.ones(len(table()), dtype=int))
    for bins in (None, 1024):
        expected = evaluate(plain, ["good"], ROLES, ["good"], resamples=20, bins=bins)
        assert evaluate(other, ["good"], ROLES, ["good"], resamples=20, bins=bins).metrics == expected.metrics


def test_categories_without_rows_need_no_role():
    names = pa.array([*table()["dataset"].to_pylist(), "unused"]).dictionary_encode()[:-1]
    assert "unused" in names.dictionary.to_pylist()
    found = evaluate(table(dataset=names), ["good"], ROLES, resamples=0)
    assert found.metrics == evaluate(table(), ["good"], ROLES, resamples=0).metrics


def test_integers_that_float64_would_round_are_named():
    with pytest.raises(ValueError, match=r"column 'good' contains whole numbers of more than 2\^53"):
        evaluate(table(good=np.arange(len(table())) + 2**60), ["good"], ROLES, resamples=0)


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
    outside = evaluate(small.slice(300), ["good"], {"mnist": "far"}, resamples=20)
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
        ({"seed": -1}, "seed must be"),
        ({"seed": 1.0}, "seed must be"),
        ({"seed": True}, "seed must be"),
        ({"results": table(finite=["yes"] * len(table()))}, "the column 'finite' contains"),
        ({"results": pa.concat_tables([table(), table()])}, "rows repeat a"),
        ({"results": table().drop_columns(["label"])}, "no column 'label'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error):
    with pytest.raises(ValueError, match=error):
        evaluate(**{"results": table(), "scores": ["good"], "roles": ROLES, **arguments})


@pytest.mark.parametrize("roles", [None, ["test"], {"test": 1}])
def test_roles_that_are_no_mapping_are_refused(roles):
    with pytest.raises(TypeError, match="roles must be a mapping from each dataset to its role"):
        evaluate(table(), ["good"], roles)


def test_numbers_of_numpy_are_accepted():
    found = evaluate(table(), ["good"], ROLES, resamples=np.int32(10), seed=np.int64(3))
    expected = evaluate(table(), ["good"], ROLES, resamples=10, seed=3)
    assert json.dumps(found.settings) == json.dumps(expected.settings)
    assert found.metrics == expected.metrics


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
