"""Fitted scores against the best single scores, with the intervals of the evaluation."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from rich.console import Console

from lightning_gradmetrics.cli.fitted_comparison import (
    compare_fitted,
    fitted_comparison_grids,
    write_fitted_comparison,
)
from lightning_gradmetrics.evaluation import evaluate
from lightning_gradmetrics.report.tables import print_grid
from lightning_gradmetrics.scoring.registry import resolve

ROLES = {"mine": "id", "other": "near"}
SCORES = resolve(
    [
        "entropy",
        "energy",
        "gradnorm",
        "combination",
        "oberdiek",
        "combination(detector=ood)",
        "confounding_detector",
    ]
)
NAMES = [score.name for score in SCORES]


def test_a_score_that_reads_the_label_is_not_a_reference(results: pa.Table) -> None:
    """It would be evaluated on its own input."""
    names = [*results.column_names[:-1], "el2n"]
    known = pa.table({**{n: results[n] for n in names[:-1]}, "el2n": (torch.arange(90) % 3 == 0).double().numpy()})
    known = known.append_column("finite", results["finite"])
    records = compare_fitted(known, [*SCORES, *resolve("el2n")], ROLES, {}, resamples=20)
    assert {r["single"] for r in records} == {"gradnorm"}


@pytest.fixture
def results() -> pa.Table:
    """Return 60 samples, a third of them errors, and 30 others; the combination ranks best, gradnorm next."""
    wrong, other = torch.arange(90) % 3 == 0, torch.arange(90) >= 60
    columns = {"dataset": ["mine"] * 60 + ["other"] * 30, "index": [*range(60), *range(30)], "prediction": [0] * 90}
    labels = [int(w) if i < 60 else None for i, w in enumerate(wrong)]
    skill = dict(zip(NAMES, (0.3, 0.5, 1.5, 4.0, 2.0, 0.1, 9.0), strict=True))
    scores = {name: (torch.randn(90) + skill[name] * (wrong | other)).tolist() for name in NAMES}
    return pa.table({**columns, "label": labels, **scores, "finite": [True] * 90})


def test_references_and_intervals(results: pa.Table) -> None:
    """Scores fitted on labels are candidates, not references; the numbers equal those of the evaluation."""
    records = compare_fitted(results, SCORES, ROLES, {}, resamples=200)
    assert len(records) == 2 * 4
    for task, dataset in (("misclassification", "mine"), ("ood", "other")):
        here = {r["score"]: r for r in records if (r["task"], r["dataset"]) == (task, dataset)}
        assert list(here) == NAMES[3:]
        assert {r["single"] for r in here.values()} == {"gradnorm"}
        assert {r["baseline"] for r in here.values()} <= {"entropy", "energy"}
        assert here["combination"]["single_verdict"] == "better"
        assert here["combination(detector=ood)"]["single_verdict"] == "worse"
    evaluation = evaluate(results, [*NAMES[3:], "gradnorm"], ROLES, ["gradnorm"], baseline="gradnorm", resamples=200)
    for c in (c for c in evaluation.comparisons if c["metric"] == "auroc" and c["task"] != "joint"):
        (record,) = (r for r in records if all(r[key] == c[key] for key in ("task", "dataset", "score")))
        assert (record["single_low"], record["single_high"]) == (c["low"], c["high"])
        assert record["single_difference"] == c["difference"] and record["auroc"] == c["value"]


def test_a_column_fitted_without_a_set_is_evaluated_on_that_set_only(results: pa.Table) -> None:
    records = compare_fitted(results, SCORES, ROLES, {"combination(detector=ood)": "other"}, resamples=20)
    mine = [r for r in records if r["score"] == "combination(detector=ood)"]
    assert [(r["dataset"], r["fitted_on"]) for r in mine] == [("other", "the other sets")]
    fitted = {r["score"]: r["fitted_on"] for r in records}
    assert fitted["combination"] == "ID samples" and fitted["oberdiek"] == "labels"
    assert fitted["confounding_detector"] == "all sets"


def test_files_and_table_say_the_same(results: pa.Table, tmp_path: Path) -> None:
    records = compare_fitted(results, SCORES, ROLES, {}, resamples=20)
    table, text = write_fitted_comparison(records, tmp_path)
    assert json.loads(text.read_text()) == records
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["auroc"]) for row in rows] == [record["auroc"] for record in records]
    console = Console(width=100, record=True, file=io.StringIO())
    for grid in fitted_comparison_grids(records):
        print_grid(console, grid)
    shown = console.export_text()
    assert all(f"{100 * r['auroc']:.1f}" in shown and f"{100 * r['single_difference']:+.1f}" in shown for r in records)
    assert "errors: mine" in shown and "near: other" in shown


def test_without_resamples_there_are_no_references(results: pa.Table) -> None:
    records = compare_fitted(results, SCORES, ROLES, {}, resamples=0)
    assert all(r["auroc"] is not None and "single" not in r for r in records)
    for grid in fitted_comparison_grids(records):
        print_grid(Console(file=io.StringIO()), grid)
