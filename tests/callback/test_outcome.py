"""The outputs of a run: the printed summary, the report, the saved files, and the logged metrics."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_gradmetrics as lgm
from tests.callback.runs import batches, test_run
from tests.models import Module, images

ROLES = {"ours": "id", "noise": "far"}


def loaders() -> list[DataLoader]:
    torch.manual_seed(0)
    return [batches(images(24) + shift, torch.randint(0, 5, (24,))) for shift in (0, 1)]


@pytest.fixture(scope="module")
def run() -> lgm.GradientMetrics:
    """Return a callback after a test run; one score reads the labels."""
    callback = lgm.GradientMetrics(["max_softmax", "energy", "pseudo_label(target='all')"], datasets=ROLES)
    test_run(callback, Module(), loaders())
    return callback


def test_the_summary_is_the_main_table(run: lgm.GradientMetrics) -> None:
    text = run.summary(width=100)
    assert "errors: ours" in text and "far: noise" in text and "errors and far:" in text
    found = run.evaluation.find(score="energy", task="ood", dataset="noise", metric="auroc")
    row = next(line.split() for line in text.splitlines() if line.startswith("energy"))
    assert row[3] == f"{100 * found[0]['value']:.1f}"
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.slow
def test_the_report_is_one_file_of_the_run(run: lgm.GradientMetrics, tmp_path) -> None:
    path = run.report(tmp_path / "pages" / "report.html")
    text = path.read_text()
    assert path.parent.name == "pages" and [*path.parent.iterdir()] == [path]
    assert "Gradient uncertainty report: Module" in text and "energy" in text and "far OOD: noise" in text


def test_a_report_with_data_of_an_unknown_name_is_refused(run: lgm.GradientMetrics, tmp_path) -> None:
    with pytest.raises(ValueError, match="dataset 'our' that is not in the run; did you mean 'ours'"):
        run.report(tmp_path / "report.html", {"our": loaders()[0].dataset})
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_saved_files_hold_the_results(run: lgm.GradientMetrics, tmp_path) -> None:
    folder = run.save(tmp_path / "run")
    assert pq.read_table(folder / "results.parquet").equals(run.results)
    content = json.loads((folder / "metrics.json").read_text())
    assert content["metrics"] == run.evaluation.metrics and content["model"]["parameters"] > 0
    assert {"metrics.csv", "table.md", "table.tex"} <= {path.name for path in folder.iterdir()}


def test_notebooks_show_the_table_and_repr_is_short(run: lgm.GradientMetrics) -> None:
    assert "<table" in run._repr_html_() and len(repr(run)) < 120 and "48 samples" in repr(run)
    unused = lgm.GradientMetrics(["energy"])
    assert repr(unused) == "GradientMetrics(energy; 0 samples scored)"
    assert "0 samples" in unused._repr_html_()
    with pytest.raises(RuntimeError, match="no finished run yet"):
        unused.summary()


@pytest.mark.parametrize("printed", [True, False])
def test_the_summary_is_printed_after_a_test(capsys, printed: bool) -> None:
    callback = lgm.GradientMetrics(["energy"], datasets=ROLES, print_summary=printed)
    test_run(callback, Module(), loaders())
    assert ("far: noise" in capsys.readouterr().out) == printed


def test_few_metrics_are_logged_by_default() -> None:
    callback = lgm.GradientMetrics(["energy", "pseudo_label(target='all')"], datasets=ROLES)
    logged = test_run(callback, Module(), loaders()).callback_metrics
    names = {name.removeprefix("gradmetrics/") for name in logged}
    places = ["ours/{}/misclassification_auroc", "ours/{}/misclassification_fpr95", "ours/{}/misclassification_aurc"]
    places += ["noise/{}/ood_auroc", "noise/{}/ood_fpr95"]
    assert names == {place.format(score) for place in places for score in ("energy", "pseudo_label.target_all")}


def test_a_task_of_a_metric_can_be_chosen() -> None:
    callback = lgm.GradientMetrics(["energy"], datasets=ROLES, metrics=["joint_aurc", "ood_auroc"])
    logged = test_run(callback, Module(), loaders()).callback_metrics
    assert set(logged) == {"gradmetrics/noise/energy/joint_aurc", "gradmetrics/noise/energy/ood_auroc"}
    with pytest.raises(ValueError, match="metrics= names 'ood_aurc'"):
        lgm.GradientMetrics(["energy"], metrics=["ood_aurc"])


def test_scores_that_read_labels_are_not_evaluated() -> None:
    callback = lgm.GradientMetrics(["el2n", "energy"])
    test_run(callback, Module(), loaders()[0])
    assert {entry["score"] for entry in callback.evaluation.metrics} == {"energy"}
    assert "el2n" in callback.results.column_names
    only = lgm.GradientMetrics(["el2n"])
    test_run(only, Module(), loaders()[0])
    assert only.evaluation.metrics == [] and "all scores read labels" in only.summary()
