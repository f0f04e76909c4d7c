"""The tables of the report: the main table, the comparisons and the operating points."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from lightning_gradmetrics.report.reading import read_run
from lightning_gradmetrics.report.samples import KEPT
from tests.report.page_tree import section
from tests.report.report_pages import FEW, cards, page, rows_of


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
