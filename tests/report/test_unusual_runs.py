"""Reports of runs without labels, with a single score, with hostile names or with broken files."""

from __future__ import annotations

import json

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_gradmetrics.report import ReportError, write_report
from lightning_gradmetrics.report.__main__ import main
from lightning_gradmetrics.report.reading import read_run
from tests.models import fast_rows
from tests.report.page_tree import parse, section
from tests.report.report_pages import FEW, ONE, cards, page, rows_of
from tests.report.report_runs import GRADIENTS, SETS, make_run


@pytest.mark.slow
def test_a_group_of_several_datasets_is_evaluated_by_its_mean(tmp_path):
    alone = section(page(tmp_path / "1", **FEW), "Scores").find("thead")[-1]
    assert "mean over near" not in alone.text
    sets = (*SETS, ("digits_7", "near", 100, False))
    run = make_run(tmp_path / "2", sets=sets, **FEW)
    tree = parse(write_report(run))
    assert "near OOD: mean over near" in section(tree, "Scores").find("thead")[-1].text
    assert "mean over datasets" in cards(tree)["Near OOD"].text
    assert len(section(tree, "ROC curves").find("svg", role="img")) == 2


def test_missing_optional_parts_leave_no_gap(tmp_path):
    gone = dict.fromkeys(("created", "command", "environment", "model", "notes", "timing", "comparisons"))
    scores = [{"name": "entropy", "family": "baseline"}, {"name": "gradnorm", "family": "gradient"}]
    datasets = [{"name": name, "role": role, "labelled": int(labelled)} for name, role, _, labelled in SETS]
    tree = page(tmp_path, changes={**gone, "scores": scores, "datasets": datasets}, **FEW)
    assert section(tree, "Notes") is None
    text = tree.find("main")[0].text
    assert "None" not in text and "nan" not in text and "Undefined" not in text


def test_without_labels_errors_are_left_out_with_a_note(tmp_path):
    tree = page(tmp_path, sets=[(name, role, rows, False) for name, role, rows, _ in SETS], **FEW)
    assert list(cards(tree)) == ["Near OOD", "Far OOD"]
    assert section(tree, "Risk and coverage") is None
    assert "No in-distribution dataset has labels" in section(tree, "Notes").text


def test_without_other_data_only_errors_are_evaluated(tmp_path):
    tree = page(tmp_path, sets=SETS[:1], **FEW)
    assert list(cards(tree)) == ["Errors"]
    assert "no out-of-distribution dataset" in section(tree, "Notes").text


def test_a_single_score_has_no_best_and_no_comparison(tmp_path):
    tree = page(tmp_path, baselines=(), gradients=("gradnorm",))
    assert section(tree, "Agreement") is None and section(tree, "Paired differences") is None
    assert not rows_of(tree, "Scores")["gradnorm"].find("b")
    assert "no baseline to compare with" in tree.find("ul", class_="advice")[0].text
    assert "The run has no other score." in cards(tree)["Errors"].text


@pytest.mark.parametrize(
    ("baselines", "gradients", "words"),
    [
        (("entropy",), ("gradnorm",), "No score exceeds entropy."),
        ((), ("gradnorm", "gradtrust"), "The run has no baseline to compare it with."),
    ],
)
def test_the_best_score_without_a_comparison_has_the_reason(tmp_path, baselines, gradients, words):
    tree = page(tmp_path, baselines=baselines, gradients=gradients, intervals=False)
    assert words in cards(tree)["Errors"].text


def test_a_run_without_finite_rows_has_no_pictures(tmp_path):
    tree = page(tmp_path, not_finite=10_000, **FEW)
    assert not tree.find("svg")
    assert "No row is finite" in section(tree, "Notes").text
    assert "No metric could be computed" in tree.find("main")[0].text


@pytest.mark.parametrize("value", fast_rows([np.nan, 0.0, -3e300], [-3e300]))
def test_unusual_scores_do_not_break_the_page(tmp_path, value):
    run = make_run(tmp_path, **FEW)
    table = pq.read_table(run / "results.parquet")
    column = pa.array(np.full(len(table), value))
    pq.write_table(table.set_column(table.column_names.index("gradnorm"), "gradnorm", column), run / "results.parquet")
    tree = parse(write_report(run))
    assert len(section(tree, "Distributions").find("svg", role="img")) == (1 if np.isnan(value) else 2)
    assert section(tree, "Agreement") is None


def test_rows_without_prediction_or_label_are_unlabelled(tmp_path):
    run = make_run(tmp_path, sets=SETS[:1], **FEW)
    table = pq.read_table(run / "results.parquet")
    for name in ("prediction", "label"):
        values = table[name].to_pylist()
        values[0 if name == "label" else 1] = None
        table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.int64()))
    pq.write_table(table, run / "results.parquet")
    rows = read_run(run).rows["digits"]
    assert rows.labelled.tolist() == [False, False] + [True] * 498


def test_markup_in_names_is_escaped(tmp_path):
    names = ("<b>max</b>", "a&b\"c'", "</script><script>alert(1)</script>", "cost $x_1$ and $", "größe_测试")
    sets = (("in <1>", "id", 60, True), ('out & "far" $\\frac$', "far", 60, False))
    tree = page(tmp_path, baselines=names[:1], gradients=names[1:], sets=sets)
    assert sorted(rows_of(tree, "Scores")) == sorted(names)
    assert len(tree.find("script")) == 1
    assert "alert" not in tree.find("script")[0].text
    assert 'out & "far" $\\frac$' in section(tree, "Scores").text


def test_an_unknown_metric_keeps_its_name_and_has_no_best(tmp_path):
    place = {"task": "ood", "dataset": "photo_patches", "metric": "depth"}
    entries = [{"score": "entropy", "value": 0.25, **place}, {"score": "gradnorm", "value": None, **place}]
    rows = rows_of(page(tmp_path, changes={"metrics": entries}, **FEW), "Scores")
    assert [row.find("td")[0].text for row in rows.values()] == ["25.0", "–"]
    assert not [row for row in rows.values() if row.find("b")]


@pytest.mark.slow
def test_many_rows_are_thinned_in_plots_with_a_note(tmp_path):
    sets = (("digits", "id", 40_000, True), ("noise", "far", 40_000, False))
    tree = page(tmp_path, sets=sets, classes=1000, **FEW)
    assert "at most 50,000 rows" in section(tree, "Notes").text
    assert (tmp_path / "report.html").stat().st_size < 300_000


@pytest.mark.slow
def test_many_scores_and_sets_stay_a_small_page(tmp_path):
    sets = (SETS[0], *((f"set_{i}", "far", 40, False) for i in range(4)))
    tree = page(tmp_path, gradients=GRADIENTS, sets=sets)
    assert len(section(tree, "Distributions").find("svg", role="img")) == len(GRADIENTS) + 5
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


@pytest.mark.slow
def test_rows_of_an_unlisted_dataset_are_noted(tmp_path):
    run = make_run(tmp_path, **FEW)
    content = json.loads((run / "metrics.json").read_text())
    content["datasets"] = content["datasets"][:2]
    (run / "metrics.json").write_text(json.dumps(content))
    assert "has rows of photo_patches" in section(parse(write_report(run)), "Notes").text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"version 2; this report reads version 1"),
        ({"version": None}, r"version None"),
        ({"scores": [{"family": "baseline"}]}, r"scores\[0\] has no 'name'"),
        ({"metrics": {"a": 1}}, r"'metrics' must be a list, not dict"),
        ({"model": ["a"]}, r"'model' must be an object, not list"),
        ({"metrics": [3]}, r"metrics\[0\] must be an object, not int"),
        (
            {"metrics": [{"score": "entropy", "task": "ood", "metric": "auroc", "value": "high"}]},
            r"metrics\[0\]\.value is 'high'; expected float",
        ),
        ({"scores": [{"name": "not_there", "family": "baseline"}]}, r"no column 'not_there'"),
    ],
)
def test_a_malformed_metrics_file_is_a_clear_error(tmp_path, changes, message):
    run = make_run(tmp_path, changes=changes, **ONE)
    with pytest.raises(ReportError, match=message):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", ["metrics.json", "results.parquet"])
def test_missing_and_broken_files_are_clear_errors(tmp_path, name):
    run = make_run(tmp_path / "run", **ONE)
    (run / name).write_text("{ not this")
    with pytest.raises(ReportError, match=f"{name} cannot be read as"):
        write_report(run)
    (run / name).unlink()
    with pytest.raises(ReportError, match=f"{name} does not exist: .* run it again"):
        write_report(run)
    with pytest.raises(ReportError, match="is not a directory; name a run directory"):
        write_report(tmp_path / "nowhere")


def test_a_directory_that_contains_runs_is_named(tmp_path):
    make_run(tmp_path / "outputs" / "first", **FEW)
    with pytest.raises(ReportError, match=r"outputs is not a run but contains 1, such as .*first"):
        write_report(tmp_path / "outputs")


def test_the_module_prints_the_path_or_the_error(tmp_path, capsys):
    run = make_run(tmp_path / "run", **ONE)
    assert main([str(run), "-o", str(tmp_path / "r.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "r.html")
    assert main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_matplotlib_settings_are_unchanged(tmp_path):
    before = dict(matplotlib.rcParams)
    page(tmp_path, **ONE)
    assert dict(matplotlib.rcParams) == before
