"""Paired comparisons of scores, and the statements about them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from lightning_gradmetrics.evaluation import (
    evaluate,
)
from lightning_gradmetrics.evaluation.protocol import compare_with_each
from lightning_gradmetrics.evaluation.statements import statements_of
from tests.evaluation.tables import ROLES, SCORES, table


def test_comparison_says_better_worse_or_cannot_tell():
    evaluation = evaluate(table(), SCORES, ROLES, ["fair"], resamples=300)
    verdicts = {(c["score"], c["dataset"]): c["verdict"] for c in evaluation.comparisons if c["metric"] == "auroc"}
    assert verdicts["good", "test"] == "better"
    assert verdicts["noise", "mnist"] == "worse"
    twin = [c for c in evaluation.comparisons if c["score"] == "twin" and c["low"] is not None]
    assert all(c["verdict"] == "cannot tell" and c["low"] == c["high"] == c["difference"] == 0 for c in twin)
    sentence = next(s for s in evaluation.statements if s.startswith('Misclassification on "test"'))
    assert "fair has AUROC" in sentence
    assert sentence.index("Better: good") < sentence.index("worse: noise") < sentence.index("cannot tell: twin")
    assert "Better than every baseline, max-adjusted: good." in sentence
    assert sum("OOD detection" in s for s in evaluation.statements) == 4
    assert any('the mean over the group "far"' in s for s in evaluation.statements)


def test_statements_name_the_first_of_many_and_count_the_rest():
    shared = {"task": "ood", "dataset": "svhn", "group": "far", "metric": "auroc", "baseline": "energy"}
    values = {"baseline_value": 0.9, "verdict": "worse", "max_adjusted_verdict": "worse"}
    members = [
        {**shared, **values, "score": f"s{i}", "difference": -i / 100, "low": -i / 100 - 0.01, "high": -i / 100 + 0.01}
        for i in (9, 3, 2, 8, 5, 7, 4, 6)
    ]
    (sentence,) = statements_of(members, 0.95)
    assert "s2 (-2.0 [-3.0, -1.0]), s3 (" in sentence and "s8" not in sentence
    assert sentence.endswith("s7 (-7.0 [-8.0, -6.0]), and 2 more, down to s9 (-9.0 [-10.0, -8.0]) (95 % intervals).")
    (whole,) = statements_of(members[:7], 0.95)
    assert all(member["score"] in whole for member in members[:7]) and "more" not in whole


def test_differences_are_score_minus_baseline_and_the_verdict_knows_the_direction(evaluation):
    for c in evaluation.comparisons:
        assert c["baseline"] == "fair" and c["difference"] == c["value"] - c["baseline_value"]
        if (c["score"], c["dataset"], c["metric"]) == ("good", "mnist", "fpr95"):
            assert c["difference"] < 0 and c["high"] < 0 and c["verdict"] == "better"


def test_the_baseline_is_chosen_in_advance():
    results = table().append_column("max_softmax", table()["fair"])
    scores = [*SCORES, "max_softmax"]
    baselines = {c["baseline"] for c in evaluate(results, scores, ROLES, ["noise"], resamples=20).comparisons}
    assert baselines == {"max_softmax"}
    chosen = evaluate(results, scores, ROLES, ["noise"], baseline="good", resamples=20)
    assert {c["baseline"] for c in chosen.comparisons} == {"good"} and chosen.settings["baseline"] == "good"
    assert {c["baseline"] for c in evaluate(table(), SCORES, ROLES, ["noise"], resamples=20).comparisons} == {"noise"}
    without = evaluate(table(), SCORES, ROLES, resamples=20)
    assert not without.comparisons and any("no baseline" in note for note in without.notes)


def test_comparisons_with_several_scores_equal_one_evaluation_for_each() -> None:
    found = compare_with_each(table(), SCORES, ROLES, ["fair", "noise"], resamples=20)
    expected = []
    for baseline in ("fair", "noise"):
        expected += evaluate(table(), SCORES, ROLES, baseline=baseline, resamples=20).comparisons
    assert found == expected


def test_the_max_adjusted_verdict_is_biased_against_the_score():
    found = evaluate(table(), SCORES, ROLES, ["fair", "twin", "noise"], resamples=200)
    for c in found.comparisons:
        if c["score"] != "good":
            assert c["max_adjusted_verdict"] is None
        elif c["metric"] == "auroc":
            assert c["best_baseline"] in ("fair", "twin", "noise")
            assert c["max_adjusted_low"] <= c["low"] + 1e-9 and c["max_adjusted_high"] <= c["high"] + 1e-9


@pytest.mark.slow
def test_equal_scores_rarely_differ_significantly():
    rng = np.random.default_rng(0)
    worse = 0
    for seed in range(40):
        signal = np.repeat([0.0, 1.0], 150)
        columns = {f"s{i}": signal + rng.normal(size=300) for i in range(6)}
        base = {
            "dataset": ["test"] * 300,
            "index": np.arange(300),
            "prediction": signal.astype(int),
            "label": [0] * 300,
        }
        found = evaluate(pa.table({**base, **columns}), list(columns), {"test": "id"}, ["s1"], resamples=100, seed=seed)
        worse += sum(c["verdict"] != "cannot tell" for c in found.comparisons if c["metric"] == "auroc")
    assert worse <= 0.12 * 200
