"""Thresholds: the rules, their guarantees by simulation, what they refuse, and their files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import norm

from lightning_gradmetrics.evaluation import Thresholds, conformal_p_values, fit_thresholds
from lightning_gradmetrics.evaluation.risk_rules import JointRisk, LearnThenTest, SelectiveRisk, error_bounds
from lightning_gradmetrics.evaluation.rules import Conformal, Coverage, Rule
from lightning_gradmetrics.evaluation.thresholds import count_accepted

ROLES = {"test": "id", "far": "far"}


def draw(rng: np.random.Generator, size: int) -> tuple[Any, Any]:
    """Standard normal scores, and errors that get likelier with the score."""
    scores = rng.normal(size=size)
    return scores, rng.random(size) < norm.cdf(scores - 2)


def true_risk(threshold: float) -> float:
    """The error rate of the samples that a threshold accepts."""
    grid = np.linspace(-8, min(threshold, 8), 4001)
    density = norm.pdf(grid)
    return float((density * norm.cdf(grid - 2)).sum() / density.sum())


def results(seed: int = 0, inside: int = 3000, outside: int = 1500) -> pa.Table:
    rng = np.random.default_rng(seed)
    scores, incorrect = draw(rng, inside)
    size = inside + outside
    return pa.table(
        {
            "dataset": ["test"] * inside + ["far"] * outside,
            "index": [*range(inside), *range(outside)],
            "prediction": [*incorrect.astype(int), *([0] * outside)],
            "label": pa.array([0] * inside + [None] * outside, pa.int64()),
            "error": np.concatenate([scores, rng.normal(size=outside)]),
            "ood": np.concatenate([rng.normal(size=inside), rng.normal(size=outside) + 4]),
            "finite": np.ones(size, dtype=bool),
        }
    )


def failures(rule: Rule, fails: Callable[[float, np.random.Generator], float], size: int, runs: int) -> float:
    """Return the mean failure of a rule that is fitted in each simulated run."""
    total = 0.0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        scores, incorrect = draw(rng, size)
        total += fails(rule.fit(scores, incorrect).threshold, rng)
    return total / runs


@pytest.mark.slow
@pytest.mark.parametrize("rule", [SelectiveRisk(0.04, 0.2), LearnThenTest(0.04, 0.2)])
def test_selective_risk_is_exceeded_no_more_often_than_delta(rule):
    exceeded = failures(rule, lambda threshold, rng: true_risk(threshold) > rule.risk, 1500, 300)
    assert exceeded <= 0.2 + 3 * np.sqrt(0.2 * 0.8 / 300)
    assert failures(rule, lambda threshold, rng: norm.cdf(threshold), 1500, 20) > 0.4


def test_coverage_is_missed_no_more_often_than_delta():
    missed = failures(Coverage(0.9, 0.2), lambda threshold, rng: norm.cdf(threshold) < 0.9, 200, 500)
    assert 0.1 < missed <= 0.2 + 3 * np.sqrt(0.2 * 0.8 / 500)


def test_conformal_rejects_in_distribution_samples_at_its_rate():
    rejected = failures(Conformal(0.1), lambda threshold, rng: norm.sf(threshold), 59, 500)
    assert rejected == pytest.approx(0.1, abs=0.006)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        calibration, scores = rng.normal(size=99), rng.normal(size=500)
        p_values = conformal_p_values(calibration, scores)
        np.testing.assert_array_equal(p_values > 0.1, scores <= Conformal(0.1).fit(calibration).threshold)


@pytest.mark.slow
def test_joint_risk_is_exceeded_no_more_often_than_delta():
    risk, population = 0.15, results(999, 60_000, 60_000)
    error, ood = population["error"].to_numpy(), population["ood"].to_numpy()
    is_ood = np.arange(120_000) >= 60_000
    bad = is_ood | (population["prediction"].to_numpy() == 1)
    exceeded = accepted_correct = 0.0
    for seed in range(60):
        fitted = fit_thresholds(results(seed), ["error", "ood"], "joint_risk", roles=ROLES, risk=risk, delta=0.2)
        accepted = (error <= fitted.values["error"]) & (ood <= fitted.values["ood"])
        exceeded += bad[accepted].mean() > risk
        accepted_correct += accepted[~bad].mean()
    assert exceeded / 60 <= 0.2 and accepted_correct / 60 > 0.3


def test_the_joint_rule_adds_one_decision():
    fitted = fit_thresholds(results(), ["error", "ood"], "joint_risk", roles=ROLES, risk=0.2)
    accepted = Thresholds.from_json(fitted.to_json()).apply(results())
    both = np.asarray(accepted["error_accept"]) & np.asarray(accepted["ood_accept"])
    np.testing.assert_array_equal(np.asarray(accepted["accept"]), both)
    assert fitted.together and "50 % of all samples are OOD" in fitted.guarantee
    with pytest.raises(ValueError, match="two scores"):
        fit_thresholds(results(), ["error"], "joint_risk", roles=ROLES, risk=0.2)
    with pytest.raises(ValueError, match="named twice"):
        fit_thresholds(results(), ["error", "error"], "joint_risk", roles=ROLES, risk=0.2)
    with pytest.raises(TypeError, match="expected a list of columns"):
        fit_thresholds(results(), "error")


@pytest.mark.parametrize(
    ("rule", "size", "message"),
    [
        (Coverage(0.95), 58, "needs at least 59 rows, got 58"),
        (Conformal(0.05), 18, "needs at least 19 rows, got 18"),
        (SelectiveRisk(0.001), 200, "rows like these would be enough|no number of rows"),
        (LearnThenTest(0.001), 200, "rows like these would be enough|no number of rows"),
    ],
)
def test_data_that_cannot_support_a_rule_are_refused(rule, size, message):
    scores, incorrect = draw(np.random.default_rng(0), size)
    with pytest.raises(ValueError, match=message):
        rule.fit(scores, incorrect)


def test_the_number_of_rows_that_would_be_enough_is_enough():
    rule, ordered = SelectiveRisk(0.05), np.arange(40.0)
    with pytest.raises(ValueError, match=r"40 rows cannot support .*: about (160|320) rows"):
        rule.fit(ordered, ordered > 30)
    assert rule.fit(np.arange(320.0), np.arange(320) > 248).coverage > 0.5
    with pytest.raises(ValueError, match="no number of rows would be enough"):
        rule.fit(ordered, np.ones(40, dtype=bool))


def test_the_joint_rule_names_about_the_number_of_rows_that_would_be_enough():
    with pytest.raises(
        ValueError, match=r"450 rows cannot support joint_risk.*: about (\d+) rows like these"
    ) as refused:
        fit_thresholds(results(0, 300, 150), ["error", "ood"], "joint_risk", roles=ROLES)
    enough = int(str(refused.value).split("about ")[1].split()[0])
    assert 900 <= enough <= 7200
    for seed in range(3):
        table = results(seed, 8 * enough // 3, 4 * enough // 3)  # "about": the counts of 225 rows are rough
        fitted = fit_thresholds(table, ["error", "ood"], "joint_risk", roles=ROLES)
        assert fitted.coverage["error"] > 0.2
    ood = np.random.default_rng(0).normal(size=2000)
    with pytest.raises(ValueError, match=r"joint risk is at least .* so no number of rows would be enough"):
        JointRisk(0.05).fit_pair([ood, ood], np.arange(2000) % 10 == 0, np.arange(2000) >= 1000)
    with pytest.raises(
        ValueError, match="needs correct in-distribution rows and out-of-distribution rows in both halves"
    ):
        fit_thresholds(results(0, 300, 0), ["error", "ood"], "joint_risk", roles=ROLES)


def test_ties_are_accepted_together():
    scores = np.repeat([0.0, 1.0], 200)
    fitted = SelectiveRisk(0.05).fit(scores, scores == 1)
    assert fitted.coverage == 0.5 and 0 < fitted.threshold < 1


def test_thresholds_accept_the_requested_fraction():
    inside = results().slice(0, 3000)
    for tpr in (0.5, 0.95, 1.0):
        thresholds = fit_thresholds(inside, ["error", "ood"], tpr=tpr)
        assert thresholds.rows == 3000
        accepted = thresholds.apply(inside)
        for score in ("error", "ood"):
            accept = accepted[f"{score}_accept"].to_numpy()
            assert accept.mean() == thresholds.coverage[score] >= tpr
            # A lower threshold would accept too few.
            assert (inside[score].to_numpy() < thresholds.values[score]).mean() < tpr


def test_roles_leave_out_of_distribution_rows_out():
    alone = fit_thresholds(results().slice(0, 3000), ["ood"])
    assert fit_thresholds(results(), ["ood"], roles=ROLES) == alone
    assert fit_thresholds(results().to_pandas(), ["ood"], roles=ROLES) == alone
    with pytest.raises(ValueError, match="no role"):
        fit_thresholds(results(), ["ood"], roles={"test": "id"})


@pytest.mark.parametrize(
    ("rule", "arguments"),
    [
        ("true_positive_rate", {"tpr": 0.95}),
        ("coverage", {"coverage": 0.95, "delta": 0.05}),
        ("conformal", {"alpha": 0.05}),
        ("selective_risk", {"risk": 0.1, "delta": 0.05}),
        ("learn_then_test", {"risk": 0.1, "delta": 0.05, "seed": 0}),
    ],
)
def test_thresholds_survive_json_exactly(rule: str, arguments: dict[str, float]) -> None:
    fitted = fit_thresholds(results(), ["error"], rule, roles=ROLES, **arguments)
    assert Thresholds.from_json(fitted.to_json()) == fitted
    assert fitted.rule == {"name": rule, **arguments} and fitted.guarantee
    with pytest.raises(ValueError, match="no thresholds"):
        Thresholds.from_json("{}")


def test_rows_that_are_not_finite_are_rejected():
    table = results()
    error = table["error"].to_numpy().copy()
    error[:2] = -1e9, np.nan
    table = table.set_column(table.column_names.index("error"), "error", pa.array(error))
    flags = np.arange(len(table)) != 2
    table = table.set_column(table.column_names.index("finite"), "finite", pa.array(flags))
    thresholds = fit_thresholds(results(), ["error"], roles=ROLES)
    accepted = thresholds.apply(table)
    assert accepted["error_accept"].to_pylist()[:3] == [True, False, False]
    assert thresholds.apply(accepted).column_names == accepted.column_names
    with pytest.raises(ValueError, match="no column 'error'"):
        thresholds.apply(table.drop_columns(["error"]))
    with pytest.raises(ValueError, match="no row of the results"):
        fit_thresholds(table.set_column(6, "finite", pa.array(np.zeros(len(table), dtype=bool))), ["error"])


def test_accepted_rows_are_counted_by_dataset() -> None:
    """Rows that are not finite are rejected and count; errors are counted among the accepted rows that have a label."""
    table = pa.table(
        {
            "dataset": ["test", "test", "test", "test", "far"],
            "prediction": [0, 1, 0, 0, 0],
            "label": pa.array([0, 0, None, 1, None], pa.int64()),
            "error": [0.0, 0.1, 0.2, np.nan, 0.3],
            "ood": [0.0, 0.1, 0.2, 0.0, 5.0],
        }
    )
    fitted = Thresholds({"error": 0.3, "ood": 0.1}, 4, {"name": "joint_risk"}, "a guarantee", {}, together=True)
    counts = count_accepted(table, fitted)
    negative = table.set_column(2, "label", table["label"].fill_null(-1))
    assert count_accepted(negative, fitted) == counts
    found = {(count["dataset"], count["score"]): tuple(count.values())[2:] for count in counts}
    assert found == {
        ("test", "error"): (4, 3, 2, 1),
        ("test", "ood"): (4, 3, 3, 2),
        ("test", None): (4, 2, 2, 1),
        ("far", "error"): (1, 1, 0, 0),
        ("far", "ood"): (1, 0, 0, 0),
        ("far", None): (1, 0, 0, 0),
    }


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        ("true_positive_rate", {"tpr": 0}, "tpr must be"),
        ("coverage", {"coverage": 1.0}, "coverage must be"),
        ("selective_risk", {"risk": 0.1, "delta": 0}, "delta must be"),
        (
            "selective_risc",
            {},
            "unknown rule 'selective_risc'; did you mean 'selective_risk'.* available: true_positive_rate",
        ),
        (["conformal"], {}, "unknown rule .'conformal'.;"),
        (0.95, {}, "unknown rule 0.95; available: true_positive_rate"),
        ("conformal", {"alfa": 0.1}, "the rule 'conformal' has no argument 'alfa'; its arguments are: alpha=0.05"),
        ("selective_risk", {"tpr": 0.9}, "has no argument 'tpr'; its arguments are: risk=0.05, delta=0.05"),
    ],
)
def test_wrong_rules_and_arguments_are_refused(rule: str, arguments: dict[str, float], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        fit_thresholds(results(), ["error"], rule, roles=ROLES, **arguments)


def test_error_bounds_agree_with_the_binomial_tail():
    from scipy.stats import binom

    low, high = error_bounds(3, 50, 0.05)
    assert binom.cdf(3, 50, high) == pytest.approx(0.05) and binom.sf(2, 50, low) == pytest.approx(0.05)
    assert error_bounds(0, 10, 0.05)[0] == 0 and error_bounds(10, 10, 0.05)[1] == 1


def test_a_nan_has_no_p_value() -> None:
    with pytest.raises(ValueError, match="1 of the scores are NaN"):
        conformal_p_values([1.0, 2.0], [np.nan, 1.0])
    assert conformal_p_values([1.0, 2.0], [-np.inf, np.inf]).tolist() == [1.0, 1 / 3]


def test_rows_without_a_dataset_are_refused() -> None:
    table = pa.table({"dataset": ["mine", None, "other"], "a": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match="1 rows have no dataset"):
        fit_thresholds(table, ["a"], roles={"mine": "id"})
