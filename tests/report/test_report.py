"""The report says what the files say, to a reader with or without labels, out-of-distribution data, or finite rows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lightning_gradmetrics.report as report_package
from lightning_gradmetrics.report import ReportError, write_report
from lightning_gradmetrics.report.__main__ import main
from lightning_gradmetrics.report.reading import read_run
from tests.report.page_tree import Node, parse, section
from tests.report.report_runs import GRADIENTS, SETS, make_run

FOUR = {"baselines": ("entropy", "max_softmax"), "gradients": ("gradnorm", "exgrad_all")}
FEW = {"baselines": ("entropy",), "gradients": ("gradnorm",)}


def page(directory: Path, **options: object) -> Node:
    return parse(write_report(make_run(directory, **options)))


def main_rows(tree: Node) -> dict[str, Node]:
    table = section(tree, "Scores").find("table")[0]
    return {row.find("span", class_="name")[0].text: row for row in table.find("tbody")[0].find("tr")}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Node]:
    directory = tmp_path_factory.mktemp("full")
    return directory, page(directory, intervals=True, comparisons=True, not_finite=3, **FOUR)


def test_the_default_output_lies_in_the_run_directory_and_another_can_be_named(tmp_path):
    run = make_run(tmp_path / "run", baselines=("entropy",), gradients=(), sets=SETS[:1])
    assert write_report(run) == run / "report.html"
    other = tmp_path / "new" / "elsewhere.html"
    assert write_report(str(run), str(other)) == other
    assert other.read_text() == (run / "report.html").read_text()


def test_the_page_is_the_same_each_time(tmp_path):
    run = make_run(tmp_path, **FEW)
    assert write_report(run, tmp_path / "1.html").read_bytes() == write_report(run, tmp_path / "2.html").read_bytes()


def test_the_page_needs_nothing_but_itself(full):
    directory, tree = full
    text = (directory / "report.html").read_text()
    for attribute in ("src", "srcset", "action", "xlink:href"):
        assert not [node for node in tree.walk() if attribute in node.attributes]
    links = [node.attributes["href"] for node in tree.walk() if "href" in node.attributes]
    assert links and all(link.startswith("#") for link in links)
    assert not re.search(r"https?://|@import|url\((?!#)|fetch\(|<link|<base", text)


def test_ids_are_unique_and_what_points_at_them_finds_them(full):
    directory, tree = full
    ids = [node.attributes["id"] for node in tree.walk() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    text = (directory / "report.html").read_text()
    pointed = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert pointed and pointed <= set(ids)


def test_sections_stand_in_reading_order(full):
    titles = [node.text for node in full[1].find("h2")]
    assert titles == [
        "Scores",
        "What the figures say",
        "Notes",
        "Distributions",
        "Finding out-of-distribution samples",
        "Finding wrong predictions",
        "Which scores agree",
        "Most uncertain samples",
        "Run details",
    ]
    assert [link.text for link in full[1].find("nav")[0].find("a")] == titles


def test_the_first_paragraph_says_what_was_judged(full):
    first = full[1].find("header")[0].find("p")[0].text.replace("\N{NARROW NO-BREAK SPACE}", "")
    for fact in ("DigitsNet", "12345 parameters", "8 classes", "digits.ckpt", "1440 samples", "3 data sets"):
        assert fact in first
    assert "2 gradient scores and 2 baseline scores" in first


def test_every_figure_of_the_main_table_is_that_of_the_file(full):
    directory, tree = full
    content = json.loads((directory / "metrics.json").read_text())
    figures = {(m["score"], m["dataset"], m["metric"]): m for m in content["metrics"] if m["dataset"]}
    columns = [("digits", "auroc", 1), ("digits", "aurc", 2)]
    columns += [(name, metric, 1) for name in ("digits_8_9", "photo_patches") for metric in ("auroc", "fpr95")]
    rows = main_rows(tree)
    assert list(rows) == ["entropy", "max_softmax", "gradnorm", "exgrad_all"]
    for score, row in rows.items():
        cells = list(row.find("td"))
        assert len(cells) == len(columns) + 1
        for (dataset, metric, digits), cell in zip(columns, cells, strict=False):
            entry = figures[score, dataset, metric]
            expected = [f"{100 * entry[key]:.{digits}f}".replace("-", "−") for key in ("value", "low", "high")]
            assert cell.text == "{}{} to {}".format(*expected)
            assert float(cell.attributes["data-sort"]) == entry["value"]


def test_headings_name_the_metric_its_direction_and_the_counts(full):
    head = section(full[1], "Scores").find("thead")[0]
    assert [button.text for button in head.find("button")] == [
        "Score",
        *("AUROC ↑", "AURC ↓"),
        *("AUROC ↑", "FPR95 ↓") * 2,
        "ms / sample ↓",
    ]
    assert "45 wrong, 452 right" in head.text and "337 out, 497 in" in head.text
    words = section(full[1], "Scores").text
    assert "times 100" in words and "AURC (lower is better)" in words


def test_the_best_of_a_column_is_bold_by_its_direction(full):
    _directory, tree = full
    rows = main_rows(tree)
    for column in range(6):
        cells = {name: row.find("td")[column] for name, row in rows.items()}
        values = {name: float(cell.attributes["data-sort"]) for name, cell in cells.items()}
        best = (max if column in (0, 2, 4) else min)(values, key=values.get)
        assert best in {name for name, cell in cells.items() if cell.find("b")}
        assert all((cell.find("b") != []) == ("best" in cell.attributes["class"]) for cell in cells.values())
        assert len({cells[name].find("b")[0].text for name in cells if cells[name].find("b")}) == 1


def test_baselines_and_gradient_scores_are_told_apart_in_words(full):
    rows = main_rows(full[1])
    marks = {name: row.find("span", class_="mark")[0].text for name, row in rows.items()}
    assert marks == {"entropy": "baseline", "max_softmax": "baseline", "gradnorm": "gradient", "exgrad_all": "gradient"}
    assert {name: row.attributes["class"] for name, row in rows.items()} == marks
    assert "all parameters" in rows["exgrad_all"].text


def test_statements_verdicts_and_the_best_of_each_family_are_told(full):
    directory, tree = full
    content = json.loads((directory / "metrics.json").read_text())
    part = section(tree, "What the figures say")
    assert [item.text for item in part.find("li")] == content["statements"]
    best, compared = part.find("table")
    assert next(row.cells[0] for row in best.find("tbody")[0].find("tr")) == "misclassification AUROC on digits"
    verdicts = [node.text for node in compared.find("span", class_="verdict")]
    assert sorted(verdicts) == sorted(entry["verdict"] for entry in content["comparisons"])
    entry = content["comparisons"][0]
    shown = [f"{100 * entry[key]:+.1f}".replace("-", "−") for key in ("difference", "low", "high")]
    assert f"{shown[0]} ({shown[1].lstrip('+')} to {shown[2].lstrip('+')})" in compared.text
    assert "against entropy" in compared.find("thead")[0].text
    assert "no intervals" not in part.text


def test_without_comparisons_the_reader_is_warned(tmp_path):
    part = section(page(tmp_path, **FEW), "What the figures say")
    assert len(part.find("table")) == 1
    assert "can be chance" in part.text


def test_a_difference_is_better_or_worse_by_the_direction_of_its_metric(tmp_path):
    def entry(score, metric, value):
        return {"score": score, "task": "ood", "dataset": "photo_patches", "metric": metric, "value": value}

    figures = [entry("entropy", "auroc", 0.9), entry("gradnorm", "auroc", 0.95)]
    figures += [entry("entropy", "fpr95", 0.20049), entry("gradnorm", "fpr95", 0.3)]
    tree = page(tmp_path, baselines=("entropy",), gradients=("gradnorm",), changes={"metrics": figures})
    rows = section(tree, "What the figures say").find("table")[0].find("tbody")[0].find("tr")
    assert [row.cells[1:] for row in rows] == [
        ["entropy 90.0", "gradnorm 95.0", "5.0 better"],
        ["entropy 20.0", "gradnorm 30.0", "10.0 worse"],
    ]


def test_a_difference_agrees_with_the_figures_beside_it(tmp_path):
    figures = [
        {"score": score, "task": "ood", "dataset": "photo_patches", "metric": "auroc", "value": value}
        for score, value in (("entropy", 0.68449), ("gradnorm", 0.67551))
    ]
    tree = page(tmp_path, changes={"metrics": figures}, **FEW)
    row = section(tree, "What the figures say").find("table")[0].find("tbody")[0].find("tr")[0]
    assert row.cells[1:] == ["entropy 68.4", "gradnorm 67.6", "0.8 worse"]


def test_notes_count_rows_that_are_not_finite(full):
    notes = section(full[1], "Notes").text
    assert "Temperature 1 was used throughout." in notes
    assert "digits: 3 of 500" in notes and "finite = false" in notes


def test_what_the_run_notes_already_say_is_not_said_twice(tmp_path):
    own = ['3 of 500 rows of "digits" are not finite and were left out', "no out-of-distribution rows: left out"]
    notes = section(page(tmp_path, not_finite=3, sets=SETS[:1], changes={"notes": own}, **FEW), "Notes")
    assert [item.text for item in notes.find("li")] == own


def test_every_picture_has_words_for_those_who_cannot_see_it(full):
    labels = [svg.attributes["aria-label"] for svg in full[1].find("svg")]
    assert len(labels) == 4 + 2 + 1 + 1
    assert all(svg.attributes["role"] == "img" for svg in full[1].find("svg"))
    assert any("Medians: right" in label and "photo_patches" in label for label in labels)


def test_pictures_take_their_colours_from_the_page(full):
    directory, tree = full
    drawings = "".join(re.findall("<svg.*?</svg>", (directory / "report.html").read_text(), flags=re.DOTALL))
    assert "#0a0b" not in drawings and "#0a0c" not in drawings
    assert "var(--s1)" in drawings and "var(--ink)" in drawings
    named = set(re.findall(r"var\((--\w+)\)", (directory / "report.html").read_text()))
    style = tree.find("style")[0].text
    dark = style[style.index("prefers-color-scheme:dark") :]
    assert all(f"{name}:" in style.split("@media")[0] and f"{name}:" in dark for name in named)


def test_legends_are_sorted_and_hold_the_figures_of_the_file(full):
    directory, tree = full
    content = json.loads((directory / "metrics.json").read_text())
    for title, metric, sign in (
        ("Finding out-of-distribution samples", "auroc", -1),
        ("Finding wrong predictions", "aurc", 1),
    ):
        for figure in section(tree, title).find("figure"):
            place = figure.find("figcaption")[0].text
            values = {
                m["score"]: m["value"] for m in content["metrics"] if (m["dataset"], m["metric"]) == (place, metric)
            }
            lines = figure.find("li")
            assert [line.find("span", class_="name")[0].text for line in lines] == sorted(
                values, key=lambda name: sign * values[name]
            )
            curves = {word for node in figure.find("g") for word in (node.attributes.get("class") or "").split()}
            assert {f"curve-{line.attributes['data-curve']}" for line in lines} <= curves


def test_most_uncertain_samples_are_the_finite_rows_with_the_highest_scores(full):
    directory, tree = full
    table = pq.read_table(directory / "results.parquet").to_pylist()
    folds = [fold for fold in section(tree, "Most uncertain samples").find("details") if not fold.find("details")[1:]]
    assert sorted(fold.find("summary")[0].text for fold in folds) == sorted(
        ["entropy", "max_softmax", "gradnorm", "exgrad_all"]
    )
    for fold in folds:
        score = fold.find("summary")[0].text
        for block in fold.find("div", class_="samples")[0].children:
            rows = [row for row in table if row["dataset"] == block.find("h4")[0].text and row["finite"]]
            top = [row["index"] for row in sorted(rows, key=lambda row: -row[score])[:5]]
            assert [int(row.cells[0]) for row in block.find("tbody")[0].find("tr")] == top
    assert "Label" not in section(tree, "Most uncertain samples").find("thead")[2].text


def test_run_details_hold_every_figure_and_the_command(full):
    directory, tree = full
    content = json.loads((directory / "metrics.json").read_text())
    details = section(tree, "Run details")
    folds = {fold.find("summary")[0].text: fold for fold in details.find("details")}
    assert len(folds["All figures"].find("tbody")[0].find("tr")) == len(content["metrics"])
    assert folds["Command"].find("pre")[0].text == content["command"]
    assert "cpu, 2 threads" in folds["Environment"].text and "Huang et al. 2021" in folds["Scores in words"].text
    assert "all: 7.25" in folds["Timing"].text
    assert not any("open" in fold.attributes for fold in details.find("details"))


def test_a_group_of_one_set_is_not_repeated_and_a_group_of_two_is_shown(tmp_path):
    alone = section(page(tmp_path / "1", **FEW), "Scores").find("thead")[0]
    assert "group near" not in alone.text
    sets = (*SETS, ("digits_7", "near", 100, False))
    together = section(page(tmp_path / "2", sets=sets, **FEW), "Scores")
    assert "group near" in together.find("thead")[0].text
    assert "mean over its data sets" in together.text


def test_missing_optional_parts_leave_no_gap(tmp_path):
    gone = dict.fromkeys(("created", "command", "environment", "model", "notes", "timing", "statements", "comparisons"))
    scores = [{"name": "entropy", "family": "baseline"}, {"name": "gradnorm", "family": "gradient"}]
    datasets = [{"name": name, "role": role, "labelled": int(labelled)} for name, role, _, labelled in SETS]
    changes = {**gone, "scores": scores, "datasets": datasets}
    tree = page(tmp_path, baselines=("entropy",), gradients=("gradnorm",), changes=changes)
    assert section(tree, "Notes") is None
    summaries = [node.text for node in section(tree, "Run details").find("summary")]
    assert summaries == ["All figures", "Files"]
    assert "None" not in tree.find("body")[0].text and "nan" not in tree.find("main")[0].text


def test_without_labels_misclassification_is_left_out_with_a_word(tmp_path):
    tree = page(tmp_path, sets=[(name, role, rows, False) for name, role, rows, _ in SETS], **FEW)
    assert "Misclassification" not in section(tree, "Scores").find("thead")[0].text
    assert section(tree, "Finding wrong predictions") is None
    assert "No in-distribution data set has labels" in section(tree, "Notes").text
    assert "Medians: digits " in tree.find("svg")[0].attributes["aria-label"]


def test_without_other_data_only_misclassification_is_judged(tmp_path):
    tree = page(tmp_path, sets=SETS[:1], **FEW)
    assert section(tree, "Finding out-of-distribution samples") is None
    assert section(tree, "Finding wrong predictions") is not None
    assert "no out-of-distribution data set" in section(tree, "Notes").text


def test_one_score_has_no_best_no_heat_map_and_no_comparison(tmp_path):
    tree = page(tmp_path, baselines=(), gradients=("gradnorm",))
    assert section(tree, "Which scores agree") is None and section(tree, "What the figures say") is None
    assert "best" not in section(tree, "Scores").find("table")[0].text and not section(tree, "Scores").find("b")[3:]


def test_no_finite_row_gives_a_page_without_pictures(tmp_path):
    tree = page(tmp_path, not_finite=10_000, **FEW)
    assert not tree.find("svg")
    assert "No row is finite" in section(tree, "Notes").text
    assert section(tree, "Scores").find("p")[0].text.startswith("No figure could be computed")


def test_some_scores_that_are_not_numbers_do_not_spoil_the_page(tmp_path):
    run = make_run(tmp_path, **FEW)
    table = pq.read_table(run / "results.parquet")
    place = table.column_names.index("gradnorm")
    broken = pa.array(np.full(len(table), np.nan))
    pq.write_table(table.set_column(place, "gradnorm", broken), run / "results.parquet")
    tree = parse(write_report(run))
    assert len(section(tree, "Distributions").find("svg")) == 2
    assert section(tree, "Which scores agree") is None


def test_constant_scores_are_drawn(tmp_path):
    run = make_run(tmp_path, **FEW)
    table = pq.read_table(run / "results.parquet")
    for name, value in (("gradnorm", 0.0), ("entropy", -3e300)):
        table = table.set_column(table.column_names.index(name), name, pa.array(np.full(len(table), value)))
    pq.write_table(table, run / "results.parquet")
    tree = parse(write_report(run))
    assert "–" in section(tree, "Which scores agree").find("svg")[0].text


def test_null_predictions_and_labels_are_rows_without_an_answer(tmp_path):
    run = make_run(tmp_path, sets=SETS[:1], **FEW)
    table = pq.read_table(run / "results.parquet")
    for name in ("prediction", "label"):
        values = table[name].to_pylist()
        values[0 if name == "label" else 1] = None
        table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.int64()))
    pq.write_table(table, run / "results.parquet")
    rows = read_run(run).rows["digits"]
    assert rows.labelled.tolist() == [False, False] + [True] * 498


def test_names_with_markup_are_shown_as_they_are(tmp_path):
    names = ("<b>max</b>", "a&b\"c'", "</script><script>alert(1)</script>", "cost $x_1$ and $", "größe_测试")
    sets = (("in <1>", "id", 60, True), ('out & "far" $\\frac$', "far", 60, False))
    tree = page(tmp_path, baselines=names[:1], gradients=names[1:], sets=sets)
    assert sorted(main_rows(tree)) == sorted(names)
    assert len(tree.find("script")) == 1 and "alert" not in tree.find("script")[0].text
    drawn = section(tree, "Which scores agree").find("svg")[0].text
    assert all(name in drawn for name in names if len(name) < 26)
    assert 'out & "far" $\\frac$ rows flagged' in section(tree, "Finding out-of-distribution samples").text


@pytest.mark.slow
def test_many_rows_are_thinned_for_plots_only_and_that_is_said(tmp_path):
    sets = (("digits", "id", 40_000, True), ("noise", "far", 40_000, False))
    tree = page(tmp_path, sets=sets, classes=1000, baselines=("entropy",), gradients=("gradnorm",))
    assert "50\N{NARROW NO-BREAK SPACE}000 rows, chosen at random with a fixed seed" in section(tree, "Notes").text
    assert len((tmp_path / "report.html").read_bytes()) < 300_000


@pytest.mark.slow
def test_many_scores_and_sets_stay_a_small_page(tmp_path):
    sets = (SETS[0], *((f"set_{i}", "far", 40, False) for i in range(4)))
    tree = page(tmp_path, gradients=GRADIENTS, sets=sets)
    assert len(GRADIENTS) + 5 == len(section(tree, "Distributions").find("svg")) == 25
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
    strokes = re.findall(r"stroke: (var\(--\w+\))", (tmp_path / "report.html").read_text())
    assert "var(--faint)" in strokes


@pytest.mark.slow
def test_more_sets_than_panels_are_cut_with_a_word(tmp_path):
    sets = (SETS[0], *((f"set_{i}", "far", 30, False) for i in range(14)))
    tree = page(tmp_path, sets=sets, baselines=("entropy",), gradients=())
    assert len(section(tree, "Finding out-of-distribution samples").find("svg")) == 12
    assert "at most 12 data sets" in section(tree, "Notes").text


def test_rows_of_a_data_set_that_is_not_described_are_named(tmp_path):
    run = make_run(tmp_path, **FEW)
    content = json.loads((run / "metrics.json").read_text())
    content["datasets"] = content["datasets"][:2]
    (run / "metrics.json").write_text(json.dumps(content))
    assert "also holds rows of photo_patches" in section(parse(write_report(run)), "Notes").text


def test_another_rate_than_95_is_said(tmp_path):
    assert (
        "true-positive rate of 90 %"
        in section(page(tmp_path, changes={"settings": {"rate": 0.9}}, **FEW), "Notes").text
    )


def test_an_unknown_metric_keeps_its_name_and_has_no_best(tmp_path):
    entries = [
        {"score": name, "task": "ood", "dataset": "photo_patches", "metric": "depth", "value": value}
        for name, value in (("entropy", 0.25), ("gradnorm", None))
    ]
    tree = page(tmp_path, baselines=("entropy",), gradients=("gradnorm",), changes={"metrics": entries})
    assert [row.find("td")[0].text for row in main_rows(tree).values()] == ["25.0", "–"]
    assert not section(tree, "Scores").find("td", class_="best")


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
def test_a_metrics_file_that_does_not_fit_is_a_clear_error(tmp_path, changes, message):
    run = make_run(tmp_path, baselines=("entropy",), gradients=(), sets=SETS[:1], changes=changes)
    with pytest.raises(ReportError, match=message):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", ["metrics.json", "results.parquet"])
def test_missing_and_broken_files_are_clear_errors(tmp_path, name):
    run = make_run(tmp_path / "run", baselines=("entropy",), gradients=(), sets=SETS[:1])
    (run / name).write_text("{ not this")
    with pytest.raises(ReportError, match=f"{name} cannot be read as"):
        write_report(run)
    (run / name).unlink()
    with pytest.raises(ReportError, match=f"{name} does not exist; .* run it again"):
        write_report(run)
    with pytest.raises(ReportError, match="is not a directory; name the run directory"):
        write_report(tmp_path / "nowhere")


def test_the_command_prints_the_path_or_the_error(tmp_path, capsys):
    run = make_run(tmp_path / "run", baselines=("entropy",), gradients=(), sets=SETS[:1])
    assert main([str(run), "-o", str(tmp_path / "r.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "r.html")
    assert main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_matplotlib_is_left_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    page(tmp_path, baselines=("entropy",), gradients=())
    assert dict(matplotlib.rcParams) == before


def test_the_report_imports_none_of_the_rest_and_no_pyplot():
    folder = Path(report_package.__file__).parent
    text = "\n".join(path.read_text() for path in folder.glob("*.py"))
    imported = set(re.findall(r"^\s*(?:from|import) ([\w.]+)", text, re.MULTILINE))
    own = {name for name in imported if name.startswith("lightning_gradmetrics")}
    assert all(name.startswith("lightning_gradmetrics.report") for name in own)
    roots = {name.split(".")[0] for name in imported - own} - set(sys.stdlib_module_names)
    assert roots == {"numpy", "pyarrow", "matplotlib"}
    alone = f"""
import sys, types
package = sys.modules["lightning_gradmetrics"] = types.ModuleType("lightning_gradmetrics")
package.__path__ = [{str(folder.parent)!r}]
import lightning_gradmetrics.report.page
sys.exit(bool({{"torch", "matplotlib.pyplot"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", alone], check=False).returncode == 0
