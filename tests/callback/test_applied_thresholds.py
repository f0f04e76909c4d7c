"""Thresholds that were fitted on one run and are applied in the next."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import lightning_gradmetrics as lgm
from tests.callback.image_runs import Answer, loader, run
from tests.models import Module, fast_rows


def test_thresholds_fitted_on_one_run_are_applied_in_the_next(tmp_path) -> None:
    callback, model = lgm.GradientMetrics(["energy", "gradnorm"]), Module()
    run("validate", callback, model, loader(20))
    fitted = lgm.evaluation.fit_thresholds(callback.results, callback.score_names, tpr=0.9)
    (tmp_path / "thresholds.json").write_text(fitted.to_json())
    kept = lgm.evaluation.Thresholds.from_json((tmp_path / "thresholds.json").read_text())
    judging = lgm.GradientMetrics(["energy", "gradnorm"], thresholds=kept)
    run("predict", judging, model, loader(8, labels=False))
    accepted = judging.results["energy_accept"].to_pylist()
    assert accepted == [value <= kept.values["energy"] for value in judging.results["energy"].to_pylist()]


@pytest.mark.parametrize(
    "rule",
    fast_rows(
        ["true_positive_rate", "coverage", "conformal", "selective_risk", "learn_then_test", "joint_risk"],
        ["conformal"],
    ),
)
def test_the_report_states_the_guarantee_of_applied_thresholds_and_their_cost(rule: str, tmp_path: Path) -> None:
    """Each rule is fitted on a table, saved as JSON, applied by the callback and shown as an operating point."""
    rng, size = np.random.default_rng(0), 4000
    held_out = pa.table(
        {
            "dataset": ["a"] * 2000 + ["b"] * 2000,
            "prediction": [0] * size,
            "label": pa.array([int(row % 50 == 0) for row in range(2000)] + [None] * 2000, pa.int64()),
            "energy": np.concatenate([rng.normal(-1.7, 0.3, 2000), rng.normal(3, 0.3, 2000)]),
            "gradnorm": np.concatenate([rng.normal(-1, 0.3, 2000), rng.normal(3, 0.3, 2000)]),
        }
    )
    roles, scores = {"a": "id", "b": "far"}, ["energy", "gradnorm"]
    fitted = lgm.evaluation.fit_thresholds(held_out, scores, rule, roles=roles)
    (tmp_path / "thresholds.json").write_text(fitted.to_json())
    kept = lgm.evaluation.Thresholds.from_json((tmp_path / "thresholds.json").read_text())
    judging = lgm.GradientMetrics(scores, datasets=roles, thresholds=kept)
    run("predict", judging, Answer(lambda b: b[0], lambda z: z), [loader(40), loader(30, labels=False)])
    together = rule == "joint_risk"
    assert ("accept" in judging.results.column_names) == together
    accepted = np.asarray(judging.results["energy"]) <= kept.values["energy"]
    np.testing.assert_array_equal(np.asarray(judging.results["energy_accept"]), accepted)
    if rule not in ("joint_risk", "learn_then_test"):  # a report takes seconds
        return
    page = html.unescape(judging.report(tmp_path / "report.html").read_text())
    assert f"Guarantee of the applied thresholds: {fitted.guarantee}." in page
    assert f"{rule}(" in page and f"fitted on {'4,000' if together else '2,000'} rows" in page
    assert ("all together" in page) == together
    inside = np.asarray(judging.results["energy_accept"])[:40].mean()
    for number in (fitted.coverage["energy"], inside):
        assert f">{100 * number:.1f}<" in page
