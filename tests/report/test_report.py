"""The report shows what the files contain, with or without labels, out-of-distribution data, or finite rows."""

from __future__ import annotations

import json
import re

import pyarrow.parquet as pq
import pytest

from lightning_gradmetrics.evaluation import evaluate
from lightning_gradmetrics.report import write_report
from lightning_gradmetrics.report.wording import interval
from tests.report.page_tree import parse, section
from tests.report.report_pages import FEW, FOUR, ONE, cards, page, rows_of
from tests.report.report_runs import SETS, make_run


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
