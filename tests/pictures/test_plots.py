"""The plots draw the same curves as other software on the given axes, and refuse an ambiguous choice."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.figure import Figure
from sklearn.metrics import auc, roc_curve

import lightning_gradmetrics as lgm

ROLES = {"test": "id", "near": "near", "far": "far"}


@pytest.fixture(scope="module")
def results() -> pa.Table:
    """Return 100 rows per dataset, a fifth of the in-distribution predictions incorrect; values repeat."""
    random = np.random.default_rng(0)
    labels = (random.random(300) < 0.2).astype(int)
    return pa.table(
        {
            "dataset": np.repeat(list(ROLES), 100),
            "index": np.tile(np.arange(100), 3),
            "prediction": np.zeros(300, int),
            "label": labels,
            "max_softmax": np.round(random.random(300) + labels, 1),
            "energy": np.round(random.random(300) + np.repeat([0, 0.2, 0.5], 100), 1),
        }
    )


def labelled(results: pa.Table, score: str) -> tuple[np.ndarray, np.ndarray]:
    here = results["dataset"].to_numpy() == "test"
    return results["label"].to_numpy()[here], results[score].to_numpy()[here]


@pytest.mark.parametrize("score", ["max_softmax", "energy"])
def test_roc_of_errors_is_that_of_scikit_learn(results: pa.Table, score: str) -> None:
    plot = lgm.plot.roc(results, ROLES, dataset="test", ax=Figure().subplots())
    false, true, _ = roc_curve(*labelled(results, score), drop_intermediate=False)
    line = plot.artists[score]
    np.testing.assert_allclose(np.array(line.get_data()), [false, true], atol=1e-6)
    assert line.get_label() == f"{score} {100 * auc(false, true):.1f}"


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_joint_roc_is_the_weighted_one_of_scikit_learn(results: pa.Table, share: float) -> None:
    plot = lgm.plot.roc(
        results, ROLES, ["energy"], dataset="far", task="joint", ood_share=share, ax=Figure().subplots()
    )
    names = results["dataset"].to_numpy()
    chosen = names != "near"
    positive = (results["label"].to_numpy() == 1) | (names == "far")
    weights = np.where(names == "far", share / (1 - share), 1.0)
    curve = roc_curve(
        positive[chosen], results["energy"].to_numpy()[chosen], sample_weight=weights[chosen], drop_intermediate=False
    )
    line = plot.artists["energy"]
    assert np.interp(0.3, line.get_xdata(), line.get_ydata()) == pytest.approx(np.interp(0.3, *curve[:2]), abs=1e-6)
    assert line.get_label() == f"energy {100 * auc(*curve[:2]):.1f}"


def test_risk_coverage_is_the_running_error_rate(results: pa.Table) -> None:
    labels, values = labelled(results, "max_softmax")
    plot = lgm.plot.risk_coverage(results, ROLES, ["max_softmax"], ax=Figure().subplots())
    for coverage, risk in zip(*plot.artists["max_softmax"].get_data(), strict=True):
        kept = np.sort(values)[round(coverage * 100) - 1] >= values
        assert risk == pytest.approx(labels[kept].mean(), abs=1e-6)
    assert plot.axes.get_ylim()[1] == pytest.approx(1.3 * labels.mean())


def test_distributions_have_one_histogram_per_kind_of_sample(results: pa.Table) -> None:
    plot = lgm.plot.distributions(results.to_pandas(), ROLES, "energy", ax=Figure().subplots())
    assert list(plot.artists) == ["test correct", "test incorrect", "near", "far"]
    for histogram in plot.artists.values():
        density, edges, _ = histogram.get_data()
        assert (density * np.diff(edges)).sum() == pytest.approx(1)


def test_lines_can_be_restyled_on_your_own_axes(results: pa.Table) -> None:
    axes = Figure().subplots()
    plot = lgm.plot.roc(results, ROLES, dataset="far", ax=axes)
    assert plot.axes is axes and plot.figure is axes.figure
    plot.artists["energy"].set_color("red")
    assert "red" in {line.get_color() for line in axes.lines}
    drawn = {(line.get_color(), line.get_linestyle()) for line in axes.lines}
    assert len(drawn) == len(axes.lines)


def test_an_ambiguous_or_unknown_choice_is_refused(results: pa.Table) -> None:
    with pytest.raises(ValueError, match=r"3 tasks match .*dataset='far' \(ood\)"):
        lgm.plot.roc(results, ROLES)
    with pytest.raises(ValueError, match="no task matches dataset='svhn'"):
        lgm.plot.roc(results, ROLES, dataset="svhn")
    with pytest.raises(ValueError, match="no column 'gradnorm'"):
        lgm.plot.roc(results, ROLES, ["gradnorm"], dataset="far")
    with pytest.raises(ValueError, match="has no risk"):
        lgm.plot.risk_coverage(results, ROLES, task="ood")


def test_a_curve_without_errors_says_what_is_missing(results: pa.Table) -> None:
    correct = results.set_column(results.column_names.index("label"), "label", results["prediction"])
    with pytest.raises(ValueError, match=r"misclassification on '\w+' has 0 samples to find and \d+ others"):
        lgm.plot.risk_coverage(correct, ROLES)


def test_labels_as_text_are_explained(results: pa.Table) -> None:
    text = pa.array(["cat"] * results.num_rows)
    named = results.set_column(results.column_names.index("label"), "label", text)
    with pytest.raises(ValueError, match="the column 'label' contains values of type string"):
        lgm.evaluation.evaluate(named, ["energy"], ROLES)
