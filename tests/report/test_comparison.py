"""The report over several runs: the best mean with its spread, the comparison with max softmax, and every value."""

from __future__ import annotations

import statistics

import pytest

from lightning_gradmetrics.report.comparison import render_comparison, write_comparison
from tests.report.page_tree import parse

SHIFTS = {"sweep/0": 0.0, "sweep/1": 0.02, "other": 0.05}


def rows(shift: float, scores: tuple[str, ...]) -> list[dict[str, str]]:
    """Return the rows of ``metrics.csv`` of one run, as text."""
    made = []
    for number, score in enumerate(scores):
        for task, dataset, group in (("misclassification", "mine", "id"), ("ood", "svhn", "far"), ("ood", "", "far")):
            place = {"score": score, "fit": "fitted" if score == "vim" else "", "task": task}
            value = str(0.8 + 0.05 * number + shift * (number + 1))
            made.append({**place, "dataset": dataset, "group": group, "metric": "auroc", "value": value})
    made.append({**made[-1], "metric": "fpr95", "value": ""})
    return made


@pytest.fixture
def runs() -> dict[str, list[dict[str, str]]]:
    made = {name: rows(shift, ("max_softmax", "vim")) for name, shift in SHIFTS.items()}
    made["other"] = rows(SHIFTS["other"], ("max_softmax",))
    return made


def test_cards_have_the_best_mean_and_its_spread(runs, tmp_path):
    tree = parse(write_comparison(runs, tmp_path / "made" / "comparison.html", {"sweep/1": "seed=1"}))
    cards = {card.find("h2")[0].text: card for card in tree.find("article")}
    assert list(cards) == ["Errors", "Far OOD"]
    values = [85.0, 89.0]
    wanted = f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"
    assert cards["Errors"].find("b", class_="big")[0].text == wanted
    assert "against max_softmax: +6.0 ± 1.4, higher in 2 of 2 runs" in cards["Errors"].text
    assert "fitted" in cards["Errors"].text and "mean over far" in cards["Far OOD"].text
    assert all(card.find("svg", role="img")[0].attributes["aria-label"] for card in cards.values())


def test_the_table_has_every_score_and_the_runs_are_named(runs):
    text = render_comparison(runs, {"sweep/1": "seed=1"})
    assert "comparison of 3 runs" in text and "seed=1" in text
    assert all(name in text for name in SHIFTS)
    assert text.count('<td class="n') == 2 * 3
    assert "80.0 to 85.0" in text and "FPR95" not in text
