"""The report shows what the files contain, with or without labels, out-of-distribution data, or finite rows."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_gradmetrics.evaluation import evaluate
from lightning_gradmetrics.report import ReportError, write_report
from lightning_gradmetrics.report.__main__ import main
from lightning_gradmetrics.report.reading import read_run
from lightning_gradmetrics.report.samples import KEPT
from lightning_gradmetrics.report.wording import interval
from tests.models import fast_rows
from tests.report.page_tree import Node, parse, section
from tests.report.report_runs import GRADIENTS, SETS, make_run

FOUR = {"baselines": ("entropy", "max_softmax"), "gradients": ("gradnorm", "exgrad_all")}
FEW = {"baselines": ("entropy",), "gradients": ("gradnorm",)}
ONE = {"baselines": ("entropy",), "gradients": (), "sets": SETS[:1]}


def page(directory: Path, **options: object) -> Node:
    return parse(write_report(make_run(directory, **options)))


def rows_of(tree: Node, title: str, number: int = -1) -> dict[str, Node]:
    """Return the rows of a table by the name of their score."""
    table = section(tree, title).find("table")[number]
    return {row.find("span", class_="name")[0].text: row for row in table.find("tbody")[0].find("tr")}


def cards(tree: Node) -> dict[str, Node]:
    return {card.find("h2")[0].text: card for card in tree.find("article")}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Node]:
    directory = tmp_path_factory.mktemp("full")
    return directory, page(directory, intervals=True, comparisons=True, not_finite=3, **FOUR)


@pytest.fixture(scope="module")
def content(full: tuple[Path, Node]) -> dict:
    return json.loads((full[0] / "metrics.json").read_text())


def test_the_report_is_written_to_the_run_directory_or_to_a_named_file(tmp_path):
    run = make_run(tmp_path / "run", **ONE)
    assert write_report(run) == run / "report.html"
    other = tmp_path / "new" / "elsewhere.html"
    assert write_report(str(run), str(other)) == other
    assert other.read_bytes() == (run / "report.html").read_bytes()


def test_the_page_requests_nothing(full):
    directory, tree = full
    text = (directory / "report.html").read_text()
    assert "default-src 'none'" in text
    for attribute in ("srcset", "action", "xlink:href"):
        assert not [node for node in tree.walk() if attribute in node.attributes]
    links = [node.attributes["href"] for node in tree.walk() if "href" in node.attributes]
    assert all(link.startswith(("#", "https://arxiv.org/abs/")) for link in links)
    assert not re.search(r"@import|url\((?!#)|fetch\(|<link|<base| src=\"(?!data:)", text)


def test_ids_are_unique_and_every_reference_has_its_target(full):
    directory, tree = full
    ids = [node.attributes["id"] for node in tree.walk() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    text = (directory / "report.html").read_text()
    pointed = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert pointed and pointed <= set(ids)


def test_sections_are_in_reading_order_within_fifteen_tab_stops(full):
    titles = [part.find("h2")[0].text for part in full[1].find("section")[1:]]
    assert titles == [
        "Scores",
        "Paired differences",
        "Operating points",
        "Risk and coverage",
        "Distributions",
        "Agreement",
        "Samples",
        "Notes",
        "Run details",
    ]
    links = full[1].find("nav")[0].find("a")
    assert [link.text for link in links] == titles
    assert len(links) <= 14
    before = full[1].find("section", id="answers")[0]
    assert not [node for node in before.walk() if "tabindex" in node.attributes or node.name in ("a", "button")]


def test_each_question_has_a_card_with_its_best_score_and_the_numbers_of_the_file(full, content):
    places = {"Errors": "digits", "Near OOD": "digits_8_9", "Far OOD": "photo_patches"}
    assert list(cards(full[1])) == list(places)
    for title, card in cards(full[1]).items():
        values = {}
        for metric in content["metrics"]:
            if metric["metric"] == "auroc" and metric["dataset"] == places[title]:
                values[metric["score"]] = metric["value"]
        best = max(values, key=values.get)
        assert card.find("span", class_="name")[0].text == best
        assert card.find("b", class_="big")[0].text == f"{100 * values[best]:.1f}"
        terms = [term.text for term in card.find("dt")]
        assert best == "max_softmax" or any(f"max_softmax: {100 * values['max_softmax']:.1f}" in term for term in terms)
        assert len(card.find("svg", role="img")) == 1
        assert card.find("li")[0].text.strip().startswith("max_softmax")


@pytest.mark.slow
def test_the_advice_follows_the_verdict_of_the_interval(tmp_path):
    def entry(score, value):
        return {"score": score, "task": "ood", "dataset": "photo_patches", "metric": "auroc", "value": value}

    metrics = [entry("entropy", 0.90), entry("gradnorm", 0.95)]
    compared = {**metrics[1], "baseline": "entropy", "baseline_value": 0.9, "difference": 0.05}
    for verdict, low, words in (
        ("better", 0.02, "use gradnorm (+5.0 over entropy, the best baseline)"),
        ("cannot tell", -0.02, "use entropy; nothing is measurably better"),
    ):
        changes = {"metrics": metrics, "comparisons": [{**compared, "low": low, "high": 0.08, "verdict": verdict}]}
        tree = page(tmp_path / verdict, changes=changes, **FEW)
        assert words in tree.find("ul", class_="advice")[0].text
        assert cards(tree)["Far OOD"].find("span", class_="verdict")[0].text == verdict
    tree = page(tmp_path / "none", changes={"metrics": metrics}, **FEW)
    assert "without intervals, that may be chance" in tree.find("ul", class_="advice")[0].text


@pytest.mark.slow
def test_the_cost_is_named_if_the_advised_score_has_it(tmp_path):
    def entry(score, value):
        return {"score": score, "task": "ood", "dataset": "photo_patches", "metric": "auroc", "value": value}

    metrics = [entry("entropy", 0.90), entry("gradnorm", 0.95)]
    scores = [
        {"name": "entropy", "family": "baseline"},
        {"name": "gradnorm", "family": "gradient", "forwards": 2},
    ]
    compared = {**metrics[1], "baseline": "entropy", "baseline_value": 0.9, "difference": 0.05, "low": 0, "high": 0.1}
    for verdict, is_named in (("better", True), ("cannot tell", False)):
        changes = {"metrics": metrics, "scores": scores, "comparisons": [{**compared, "verdict": verdict}]}
        advice = page(tmp_path / verdict, changes=changes, **FEW).find("ul", class_="advice")[0].text
        assert ("It takes 2 forward passes instead of 1." in advice) == is_named


@pytest.mark.slow
def test_scores_that_rank_alike_are_marked(tmp_path, content):
    copies = [{**entry, "score": "twin"} for entry in content["metrics"] if entry["score"] == "entropy"]
    scores = [*content["scores"], {"name": "twin", "family": "baseline"}]
    run = make_run(tmp_path / "run", changes={"metrics": [*content["metrics"], *copies], "scores": scores}, **FOUR)
    results = pq.read_table(run / "results.parquet")
    pq.write_table(results.append_column("twin", results["entropy"]), run / "results.parquet")
    rows = rows_of(parse(write_report(run)), "Scores")
    marks = {name: [mark.text for mark in row.find("span", class_="mark")] for name, row in rows.items()}
    assert [mark for given in marks.values() for mark in given if "ranks as" in mark] == ["ranks as entropy"]
    assert "ranks as entropy" in marks["twin"]


@pytest.mark.slow
def test_cards_show_the_verdicts_of_the_evaluation(tmp_path):
    options = {"baselines": ("entropy", "max_softmax"), "gradients": ("gradnorm",), "sets": SETS[::2]}
    run = make_run(tmp_path, **options)
    table = pq.read_table(run / "results.parquet")
    roles = {name: role for name, role, *_ in SETS[::2]}
    names = ["entropy", "gradnorm", "max_softmax"]
    evaluation = evaluate(table, names, roles, ["entropy", "max_softmax"], resamples=50)
    content = json.loads((run / "metrics.json").read_text())
    content |= {"metrics": evaluation.metrics, "comparisons": evaluation.comparisons}
    (run / "metrics.json").write_text(json.dumps(content))
    ood = [entry for entry in evaluation.comparisons if (entry["task"], entry["metric"]) == ("ood", "auroc")]
    best = max(evaluation.find(metric="auroc", task="ood"), key=lambda each: each["value"])["score"]
    entry = next(each for each in ood if each["score"] == best)
    card = cards(parse(write_report(run)))["Far OOD"]
    assert f"({interval(entry['low'], entry['high'])})" in card.text
    assert card.find("span", class_="verdict")[0].text == entry["verdict"]


def test_every_number_of_the_main_table_is_that_of_the_file(full, content):
    by_place = {(m["score"], m["dataset"], m["metric"]): m for m in content["metrics"] if m["dataset"]}
    columns = [("digits", "auroc", 1), ("digits", "aurc", 2)]
    columns += [(name, metric, 1) for name in ("digits_8_9", "photo_patches") for metric in ("auroc", "fpr95")]
    rows = rows_of(full[1], "Scores")
    first = [float(row.find("td")[0].attributes["data-sort"]) for row in rows.values()]
    assert first == sorted(first, reverse=True)
    assert len(rows) == 4
    for score, row in rows.items():
        for (dataset, metric, digits), cell in zip(columns, row.find("td"), strict=True):
            entry = by_place[score, dataset, metric]
            expected = [f"{100 * entry[key]:.{digits}f}".replace("-", "−") for key in ("value", "low", "high")]
            assert cell.text == "{}{} to {}".format(*expected)
            assert float(cell.attributes["data-sort"]) == entry["value"]


def test_the_best_of_a_column_is_bold_by_its_direction(full):
    rows = rows_of(full[1], "Scores")
    for column in range(6):
        values = {name: float(row.find("td")[column].attributes["data-sort"]) for name, row in rows.items()}
        best = max(values, key=values.get) if column in (0, 2, 4) else min(values, key=values.get)
        bold = {name for name, row in rows.items() if row.find("td")[column].find("b")}
        assert best in bold
        assert len({rows[name].find("td")[column].find("b")[0].text for name in bold}) == 1


def test_headings_name_the_question_the_dataset_and_the_metric(full):
    head = section(full[1], "Scores").find("thead")[-1]
    groups = [cell.text for cell in head.find("th", scope="colgroup")]
    assert groups == ["errors: digits", "near OOD: digits_8_9", "far OOD: photo_patches"]
    buttons = [button.text for button in head.find("button")]
    assert buttons == ["Score", "AUROC ↑", "AURC ↓", "AUROC ↑", "FPR95 ↓", "AUROC ↑", "FPR95 ↓"]
    labels = [button.attributes["aria-label"] for button in head.find("button")[1:]]
    assert len(set(labels)) == 6


def test_scores_are_marked_by_family_and_fit(tmp_path):
    scores = [
        {"name": "entropy", "family": "baseline"},
        {"name": "gradnorm", "family": "gradient", "fit": "fitted on labels"},
    ]
    tree = page(tmp_path, changes={"scores": scores}, **FEW)
    marks = [mark.text for mark in rows_of(tree, "Scores")["gradnorm"].find("span", class_="mark")]
    assert marks == ["gradient", "fitted on labels"]


def test_a_score_that_reads_labels_is_listed_but_not_evaluated(tmp_path):
    scores = [
        {"name": "entropy", "family": "baseline"},
        {"name": "gradnorm", "family": "gradient", "fit": "reads labels"},
    ]
    tree = page(tmp_path, changes={"scores": scores}, **FEW)
    assert list(rows_of(tree, "Scores")) == ["entropy"]
    assert {card.find("span", class_="name")[0].text for card in cards(tree).values()} == {"entropy"}
    assert section(tree, "Samples").find("summary")[0].text == "gradnorm"
    assert "gradnorm read the true label" in section(tree, "Notes").text


@pytest.mark.slow
def test_paired_differences_have_their_true_sign_and_one_verdict(tmp_path):
    def compared(metric, value, baseline, stored, verdict):
        place = {
            "task": "ood",
            "dataset": "photo_patches",
            "metric": metric,
            "score": "gradnorm",
            "baseline": "entropy",
        }
        low, high = sorted([stored - 0.01, stored + 0.02])
        numbers = {"value": value, "baseline_value": baseline, "difference": stored, "low": low, "high": high}
        return {**place, **numbers, "verdict": verdict}

    entries = [compared("auroc", 0.95, 0.90, 0.05, "better"), compared("fpr95", 0.30, 0.20, 0.10, "worse")]
    tree = page(tmp_path, changes={"comparisons": entries}, **FEW)
    cells = rows_of(tree, "Paired differences")["gradnorm"].find("td")
    assert [cell.text for cell in cells] == ["better +5.04.0 to 7.0", "worse +10.09.0 to 12.0"]
    assert "against entropy" in section(tree, "Paired differences").find("thead")[0].text


def test_operating_points_are_accuracies_and_rejection_rates(full):
    directory, tree = full
    rows = read_run(directory).finite_rows()
    inside, score = rows["digits"], "gradnorm"
    order = np.argsort(inside.scores[score])
    expected = []
    for share in KEPT:
        kept = order[: int(np.ceil(share * len(order)))]
        expected.append(f"{100 * (1 - inside.incorrect[kept].mean()):.1f}")
    assert [cell.text for cell in rows_of(tree, "Operating points", 0)[score].find("td")] == expected
    limit = np.sort(inside.scores[score])[int(np.ceil(0.95 * len(order))) - 1]
    shares = [inside.scores[score][inside.incorrect]] + [rows[name].scores[score] for name in list(rows)[1:]]
    wanted = [f"{100 * (values > limit).mean():.1f}" for values in shares]
    assert [cell.text for cell in rows_of(tree, "Operating points", 1)[score].find("td")][1:] == wanted


def test_applied_thresholds_are_shown_with_the_stored_counts(tmp_path):
    """A threshold that accepts every score is named in words; rows that are not finite count as rejected."""

    def count(score: str | None, dataset: str, *numbers: int) -> dict[str, object]:
        keys = ("score", "dataset", "rows", "accepted", "labelled", "incorrect")
        return dict(zip(keys, (score, dataset, *numbers), strict=True))

    applied = {
        "values": {"entropy": sys.float_info.max, "gradnorm": -1.25},
        "rows": 1000,
        "rule": {"name": "joint_risk", "risk": 0.1},
        "guarantee": "a guarantee",
        "coverage": {"entropy": 1.0, "gradnorm": 0.5},
        "together": True,
        "accepted": [
            count("entropy", "digits", 500, 490, 490, 49),
            count("entropy", "photo_patches", 600, 600, 0, 0),
            count("gradnorm", "digits", 500, 250, 250, 5),
            count("gradnorm", "photo_patches", 600, 60, 0, 0),
            count(None, "digits", 500, 240, 240, 3),
            count(None, "photo_patches", 600, 60, 0, 0),
        ],
    }
    table = section(page(tmp_path, changes={"thresholds": applied}, **FEW), "Operating points").find("table")[0]
    found = []
    for row in table.find("tbody")[0].find("tr"):
        found.append([cell.text for cell in row.find("td")])
    assert found == [
        ["none: accepts all", "100.0", "98.0", "10.0", "100.0"],
        ["−1.25", "50.0", "50.0", "2.0", "10.0"],
        ["", "", "48.0", "1.2", "10.0"],
    ]


def test_max_softmax_is_highlighted_and_labelled_in_every_curve(full):
    for part in (full[1].find("section", id="answers")[0], section(full[1], "Risk and coverage")):
        for figure in part.find("figure"):
            names = [line.find("span")[0].text for line in figure.find("li") if line.find("span")]
            assert names[0] == "max_softmax"
            assert figure.find("line")[0].attributes["stroke"] == "var(--ink)"


def test_pictures_use_the_colours_of_the_page(full):
    directory, tree = full
    text = (directory / "report.html").read_text()
    assert "#0a0b" not in text and "#0a0c" not in text
    named = set(re.findall(r"var\((--[a-z]\w+)\)", text))
    style = tree.find("style")[0].text
    light, dark = style.split("prefers-color-scheme: dark")
    assert {"--ink", "--s1"} <= named
    assert all(f"{name}:" in light for name in named)
    assert all(f"{name}:" in dark for name in named)


def test_every_picture_has_a_text_alternative(full):
    pictures = full[1].find("svg", role="img")
    assert len(pictures) == 3 + 1 + 4
    assert all(picture.attributes["aria-label"] for picture in pictures)
    assert all(table.find("caption") for table in full[1].find("table"))


def test_samples_are_the_finite_rows_with_extreme_scores(full):
    directory, tree = full
    table = pq.read_table(directory / "results.parquet").to_pylist()
    for fold in section(tree, "Samples").find("details"):
        score = fold.find("summary")[0].text
        for block in fold.find("table"):
            dataset, kind = block.find("caption")[0].text.split(": ")
            rows = [row for row in table if row["dataset"] == dataset and row["finite"]]
            ordered = sorted(rows, key=lambda row: row[score], reverse=kind == "most uncertain")
            shown = [int(row.cells[0]) for row in block.find("tbody")[0].find("tr")]
            assert shown == [row["index"] for row in ordered[:5]]


@pytest.mark.slow
def test_run_details_have_every_metric_and_no_absolute_path(tmp_path):
    command = "gradmetrics data.id={mine:/home/ada/photos/test} seed=3"
    run = make_run(tmp_path, changes={"command": command, "settings": {"seed": 3}}, **FEW)
    (run / ".hydra").mkdir()
    (run / ".hydra" / "config.yaml").write_text("checkpoint: /home/ada/models/net.pt\n")
    details = section(parse(write_report(run)), "Run details")
    folds = {fold.find("summary")[0].text: fold for fold in details.find("details")}
    wanted = json.loads((run / "metrics.json").read_text())["metrics"]
    assert len(folds["All metrics"].find("tbody")[0].find("tr")) == len(wanted)
    assert folds["Command"].find("pre")[0].text == "gradmetrics data.id={mine:…/photos/test} seed=3"
    assert folds["Configuration"].find("pre")[0].text.strip() == "checkpoint: …/models/net.pt"
    assert "seed3" in folds["Evaluation"].text
    assert "cpu, 2 threads" in folds["Environment"].text
    assert folds["Scores and papers"].find("a")[0].attributes["href"] == "https://arxiv.org/abs/2110.00218"
    assert "/home/ada" not in (run / "report.html").read_text()


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
