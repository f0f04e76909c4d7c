"""Functional meters against scikit-learn, brute force, hand-computed cases and identities."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from lightning_gradmetrics.meters import functional as F
from lightning_gradmetrics.meters.functional import curves as C
from lightning_gradmetrics.meters.functional import ranking as R
from lightning_gradmetrics.meters.functional import sorting
from lightning_gradmetrics.meters.functional.counts import count, flip

COUNTED = [
    F.auroc,
    F.aurc,
    F.e_aurc,
    F.augrc,
    F.average_precision,
    F.fpr_at_tpr,
    F.accuracy_at_coverage,
    F.auac,
    F.aufc,
]
SHAPES = {
    "normal": lambda z: z,
    "tiny": lambda z: z * 1e-30,
    "huge": lambda z: z * 1e30,
    "far from zero": lambda z: z + 40,
    "negative": lambda z: -z.abs() - 5,
    "tied": lambda z: (z * 2).round(),
    "two values": lambda z: (z > 0.3) * 1.0,
    "all equal": lambda z: z * 0 + 7,
    "1e-30 beside 1e30": lambda z: torch.where(z > 0, 1e30 * (1 + z), 1e-30 * (z - 1)),
    "infinite ends": lambda z: torch.where(z > 1, torch.inf, torch.where(z < -1, -torch.inf, z)),
    "half precision": lambda z: z.half(),
    "whole numbers": lambda z: (z * 3).long(),
    "float64": lambda z: 1e8 + z.double(),
}


def sample(name: str, size: int = 301) -> tuple[torch.Tensor, torch.Tensor]:
    z = torch.randn(size)
    target = (torch.rand(size) < torch.sigmoid(z)).long()
    return SHAPES[name](z), target


def finite(scores: torch.Tensor) -> np.ndarray:
    """Return scores for scikit-learn, with infinities replaced by finite values of the same rank."""
    return torch.nan_to_num(scores.double(), posinf=1e300, neginf=-1e300).numpy()


@pytest.mark.parametrize("name", SHAPES)
def test_ranking_agrees_with_scikit_learn(name):
    scores, target = sample(name)
    known, labels = finite(scores), target.numpy()
    assert F.auroc(scores, target).item() == pytest.approx(roc_auc_score(labels, known), abs=1e-6)
    assert F.average_precision(scores, target).item() == pytest.approx(average_precision_score(labels, known), abs=1e-6)
    ours = F.average_precision(scores, target, positive="in").item()
    assert ours == pytest.approx(average_precision_score(1 - labels, -known), abs=1e-6)
    fpr, tpr, thresholds = roc_curve(labels, known, drop_intermediate=False)
    found = F.roc(scores, target)
    np.testing.assert_allclose(found[0], fpr, atol=1e-6)
    np.testing.assert_allclose(found[1], tpr, atol=1e-6)
    np.testing.assert_allclose(finite(found[2][1:]), thresholds[1:], rtol=1e-6)
    assert F.fpr_at_tpr(scores, target).item() == pytest.approx(fpr[np.argmax(tpr >= 0.95)], abs=1e-6)
    precision, recall, thresholds = precision_recall_curve(labels, known)
    found = F.precision_recall_curve(scores, target)
    np.testing.assert_allclose(found[0], precision, atol=1e-6)
    np.testing.assert_allclose(found[1], recall, atol=1e-6)
    np.testing.assert_allclose(finite(found[2]), thresholds, rtol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_counts_and_samples_give_equal_metrics(name):
    scores, target = sample(name)
    counts = count(scores, target)
    torch.testing.assert_close(R.auroc_of_counts(counts).float(), F.auroc(scores, target))
    for positive in ("out", "in"):
        area = R.average_precision_of_counts(counts, positive).float()
        torch.testing.assert_close(area, F.average_precision(scores, target, positive=positive))
        other = R.fpr_at_tpr_of_counts(flip(counts) if positive == "in" else counts).float()
        torch.testing.assert_close(other, F.fpr_at_tpr(scores, target, positive=positive))
    for ours, theirs in [(C.roc_of_counts, F.roc), (C.precision_recall_curve_of_counts, F.precision_recall_curve)]:
        for one, other in zip(ours(counts), theirs(scores, target), strict=True):
            torch.testing.assert_close(one, other)


def test_quantiles_of_huge_scores_and_close_quantiles():
    found = F.distribution(torch.tensor([-1.7e308, 1.7e308], dtype=torch.float64), quantiles=[0.5, 0.75])
    assert found["q50"] == 0 and found["q75"] == 0.85e308
    found = F.distribution(torch.arange(9.0), quantiles=[0.9999999, 1.0, 0.07])
    assert [name for name in found if name.startswith("q")] == ["q99.99999", "q100", "q7"]


def test_well_separated_raw_scores_are_not_squashed():
    # torchmetrics on these raw scores gives 0.5, because a sigmoid makes ones of them all.
    scores, target = torch.tensor([20.0, 30.0, 40.0, 60.0]), torch.tensor([0, 0, 1, 1])
    assert F.auroc(scores, target) == 1
    assert F.fpr_at_tpr(scores, target) == 0


def brute_orders(scores, target):
    """Targets in every order that ascending scores allow."""
    groups = [target[scores == value].tolist() for value in sorted(set(scores.tolist()))]
    for orders in itertools.product(*(list(itertools.permutations(group)) for group in groups)):
        yield list(itertools.chain(*orders))


def mean_over_orders(scores, target, value):
    return float(np.mean([value(order) for order in brute_orders(scores, target)]))


def brute_aurc(order):
    return np.mean([np.mean(order[:k]) for k in range(1, len(order) + 1)])


def brute_f1(order):
    right = [1 - wrong for wrong in order]
    return np.mean([2 * sum(right[:k]) / (k + sum(right)) for k in range(1, len(order) + 1)])


tied_samples = st.lists(st.tuples(st.sampled_from([-2.0, 0.0, 1e-30, 1e30]), st.booleans()), min_size=1, max_size=6)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(tied_samples)
def test_ties_are_the_mean_over_all_orders(pairs):
    scores, target = torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])
    assert F.aurc(scores, target).item() == pytest.approx(mean_over_orders(scores, target, brute_aurc), abs=1e-6)
    assert F.aufc(scores, target).item() == pytest.approx(mean_over_orders(scores, target, brute_f1), abs=1e-6)
    assert F.auac(scores, target).item() == pytest.approx(1 - F.aurc(scores, target).item(), abs=1e-6)
    oracle = brute_aurc(sorted(target.tolist()))
    assert F.e_aurc(scores, target).item() == pytest.approx(F.aurc(scores, target).item() - oracle, abs=1e-6)
    for coverage in (0.01, 0.5, 0.8, 1.0):
        k = math.ceil(coverage * len(pairs) - 1e-9)
        right = mean_over_orders(scores, target, lambda order, k=k: 1 - np.mean(order[:k]))
        assert F.accuracy_at_coverage(scores, target, coverage).item() == pytest.approx(right, abs=1e-6)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(allow_nan=False, width=32), st.booleans()), min_size=2, max_size=60))
def test_identities_and_invariances(pairs):
    scores, target = torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])
    rate = target.double().mean().item()
    generalised = F.augrc(scores, target).item()
    if 0 < rate < 1:
        area = F.auroc(scores, target).item()
        assert generalised == pytest.approx(rate * (1 - rate) * (1 - area) + rate**2 / 2, abs=1e-6)
        assert area + F.auroc(-scores, target).item() == pytest.approx(1, abs=1e-6)
        assert F.auroc(-scores, ~target).item() == pytest.approx(area, abs=1e-6)
        order = torch.randperm(len(pairs))
        for metric in COUNTED:
            torch.testing.assert_close(metric(scores[order], target[order]), metric(scores, target))
    else:
        assert generalised == pytest.approx(rate**2 / 2, abs=1e-6)
    assert 0 <= F.e_aurc(scores, target) <= F.aurc(scores, target) + 1e-6


@settings(max_examples=60, deadline=None)
@given(tied_samples, st.sampled_from([0.1, 0.5, 0.95, 1.0]))
def test_operating_points_against_every_threshold(pairs, rate):
    scores, target = torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])
    values = sorted(set(scores.tolist()))
    accepted = [scores <= value for value in values]
    good = [a.double().mean().item() for a in accepted if target[a].double().mean() <= rate]
    assert F.coverage_at_risk(scores, target, risk=rate).item() == pytest.approx(max(good, default=0), abs=1e-6)
    if 0 < target.sum() < len(target):
        flagged = [scores >= value for value in values]
        out = min(f[~target].double().mean() for f in flagged if f[target].double().mean() >= rate - 1e-9)
        assert F.fpr_at_tpr(scores, target, rate).item() == pytest.approx(out.item(), abs=1e-6)
        inside = min(a[target].double().mean() for a in accepted if a[~target].double().mean() >= rate - 1e-9)
        assert F.fpr_at_tpr(scores, target, rate, positive="in").item() == pytest.approx(inside.item(), abs=1e-6)


def test_hand_computed():
    scores, target = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])
    assert F.auroc(scores, target) == 0.75
    assert F.average_precision(scores, target).item() == pytest.approx(5 / 6)
    assert F.aurc(scores, target).item() == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert F.e_aurc(scores, target).item() == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4 - (1 / 3 + 1 / 2) / 4)
    assert F.augrc(scores, target).item() == pytest.approx(0.25 * 0.25 + 0.125)
    coverage, risk, thresholds = F.risk_coverage_curve(scores, target)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk.tolist() == pytest.approx([0, 0.5, 1 / 3, 0.5])
    assert thresholds.tolist() == pytest.approx([0.1, 0.35, 0.4, 0.8])


def test_threshold_areas_are_integrals_over_the_scaled_threshold():
    scores, target = torch.randn(40).double(), torch.rand(40) < 0.3
    scaled = (scores - scores.min()) / (scores.max() - scores.min())
    grid = (torch.arange(200_000).double() + 0.5) / 200_000
    order = scaled.argsort()
    k = torch.searchsorted(scaled[order], grid, right=True)
    right = torch.cat([torch.zeros(1), (~target)[order].double().cumsum(0)])[k]
    assert F.auac(scores, target, mode="threshold").item() == pytest.approx((right / k).mean().item(), abs=1e-4)
    f1 = 2 * right / (k + (~target).sum())
    assert F.aufc(scores, target, mode="threshold").item() == pytest.approx(f1.mean().item(), abs=1e-4)
    # An outlier changes the area over thresholds and not the area over coverage.
    moved = scores.clone()
    moved[order[-1]] += 100
    assert F.auac(moved, target) == F.auac(scores, target)
    assert abs(F.auac(moved, target, mode="threshold") - F.auac(scores, target, mode="threshold")) > 0.01
    with pytest.raises(ValueError, match="infinite"):
        F.auac(torch.tensor([0.0, torch.inf]), torch.tensor([0, 1]), mode="threshold")


def test_oscr_is_the_area_under_its_curve():
    scores, outside, right = (torch.randn(80) * 2).round(), torch.rand(80) < 0.4, torch.rand(80) < 0.7
    inside = ~outside
    below = [(scores[inside & right] < s).sum() + (scores[inside & right] == s).sum() / 2 for s in scores[outside]]
    expected = sum(float(b) for b in below) / (inside.sum() * outside.sum())
    assert F.oscr(scores, outside, right).item() == pytest.approx(expected.item(), abs=1e-6)
    everything = torch.ones(80)
    torch.testing.assert_close(F.oscr(scores, outside, everything), F.auroc(scores, outside))
    assert F.oscr(scores, outside, torch.zeros(80)) == 0


def test_distribution_agrees_with_torch_at_every_scale():
    for scale, offset in [(1.0, 0.0), (1e-300, 0.0), (1e300, 0.0), (1.0, 1e8)]:
        scores = torch.randn(501).double() * scale + offset
        with_bad = torch.cat([scores, torch.tensor([torch.nan, torch.inf, -torch.inf]).double()])
        found = F.distribution(with_bad)
        assert (found["count"], found["non_finite"]) == (501, 3)
        torch.testing.assert_close(found["mean"] / scale, (scores / scale).mean(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["std"] / scale, (scores / scale).std(), rtol=1e-7, atol=0)
        for q in (5, 25, 50, 75, 95):
            torch.testing.assert_close(found[f"q{q}"], scores.quantile(q / 100))
        assert (found["min"], found["max"]) == (scores.min(), scores.max())


def test_spearman_agrees_with_scipy():
    scores = torch.randn(200, 4)
    scores[:, 1] = (scores[:, 0] * 2).round()
    scores[:, 2] = scores[:, 0].exp() * 1e30
    np.testing.assert_allclose(F.spearman(scores), spearmanr(scores.numpy()).statistic, atol=1e-6)
    assert F.spearman(scores)[0, 2] == 1


def test_calibration_error():
    probability = torch.cat([torch.full((100,), 0.25), torch.full((100,), 0.85)])
    target = torch.cat([torch.arange(100) < 25, torch.arange(100) < 45])
    assert F.calibration_error(probability, target, n_bins=10).item() == pytest.approx(0.2, abs=1e-6)
    assert F.calibration_error(probability, target, n_bins=10, norm="max").item() == pytest.approx(0.4, abs=1e-6)
    certain, wrong = torch.tensor([1.0, 0.99]), torch.tensor([0, 1])  # both are in the last bin
    assert F.calibration_error(certain, wrong).item() == pytest.approx(0.495, abs=1e-6)
    with pytest.raises(ValueError, match="raw scores are not calibrated"):
        F.calibration_error(torch.tensor([0.5, 1.5]), torch.tensor([0, 1]))


NEEDS_BOTH = [F.auroc, F.fpr_at_tpr]


@pytest.mark.parametrize("metric", [*COUNTED, F.coverage_at_risk, F.calibration_error])
def test_no_samples_is_announced_once(metric):
    with pytest.warns(UserWarning, match="undefined") as caught:
        assert metric(torch.zeros(0), torch.zeros(0)).isnan()
    assert len(caught) == 1


@pytest.mark.parametrize("target", [0, 1])
def test_one_class_only(target):
    scores, target = torch.randn(5), torch.full((5,), target)
    for metric in NEEDS_BOTH:
        with pytest.warns(UserWarning, match="each class") as caught:
            assert metric(scores, target).isnan()
        assert len(caught) == 1
    with pytest.warns(UserWarning, match="each class"):
        rates = F.roc(scores, target)[:2]
    assert [bool(rate.isnan().all()) for rate in rates] == [bool(target[0]), not target[0]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        incorrect = bool(target[0])
        assert F.aurc(scores, target) == float(incorrect)
        assert F.e_aurc(scores, target) == 0
        assert F.augrc(scores, target) == 0.5 * incorrect
        assert F.coverage_at_risk(scores, target) == 1 - incorrect
        assert F.average_precision(scores, target, positive="out" if incorrect else "in").item() == pytest.approx(1)


def test_one_distinct_score_has_no_threshold_area():
    with pytest.warns(UserWarning, match="two distinct scores"):
        assert F.auac(torch.ones(3), torch.tensor([0, 1, 0]), mode="threshold").isnan()


def test_constant_score_has_no_correlation():
    with pytest.warns(UserWarning, match="undefined"):
        assert F.spearman(torch.tensor([[1.0, 2.0], [1.0, 3.0]]))[0, 1].isnan()


@pytest.mark.parametrize("metric", COUNTED)
@pytest.mark.parametrize(
    ("scores", "target", "error"),
    [
        (torch.tensor([1.0, torch.nan]), torch.tensor([0, 1]), "1 NaN among 2"),
        (torch.zeros(2, 1), torch.zeros(2, 1), r"shape \(N,\)"),
        (torch.zeros(3), torch.zeros(2), "shape of scores"),
        (torch.zeros(2), torch.tensor([0, 2]), "0 or 1"),
        (torch.zeros(2), torch.tensor([0, torch.nan]), "0 or 1"),
    ],
)
def test_wrong_values_are_refused(metric, scores, target, error):
    with pytest.raises(ValueError, match=error):
        metric(scores, target)


def test_wrong_arguments_are_refused():
    scores, target = torch.randn(4), torch.tensor([0, 1, 0, 1])
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got builtins\.list"):
        F.auroc([1.0, 2.0], target)
    with pytest.raises(TypeError, match="real numbers"):
        F.auroc(scores.to(torch.complex64), target)
    with pytest.raises(TypeError, match=r"target must be a torch\.Tensor"):
        F.auroc(scores, [0, 1, 0, 1])
    for rate in (0, -1, 1.5, "0.9", True):
        with pytest.raises(ValueError, match="above 0"):
            F.fpr_at_tpr(scores, target, rate)
    with pytest.raises(ValueError, match="'out'"):
        F.average_precision(scores, target, positive="ood")
    with pytest.raises(ValueError, match="'coverage' or 'threshold'"):
        F.auac(scores, target, mode="score")
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        F.distribution(scores, quantiles=[1.5])
    with pytest.raises(ValueError, match=r"\(N, S\)"):
        F.spearman(scores)


BESIDE_ONE = torch.tensor(1.0, dtype=torch.float64).nextafter(torch.tensor(2.0, dtype=torch.float64))
FLOAT64 = {
    "distinct": lambda z: z,
    "tied": lambda z: (7 * z).round() / 7,
    "all equal": lambda z: z * 0 + 0.1,
    "differ in the last bit": lambda z: torch.where(z > 0, 1.0, BESIDE_ONE),
    "some differ in the last bit": lambda z: torch.where(z > 1, z, torch.where(z > 0, -1.0, -BESIDE_ONE)),
    "zeros of both signs": lambda z: torch.where(z.abs() < 0.5, z * 0, z),
    "infinite": lambda z: torch.where(z.abs() > 1, z * torch.inf, z),
    "below the smallest normal number": lambda z: z * 1e-310,
}


@pytest.mark.parametrize("shape", FLOAT64.values(), ids=FLOAT64)
@pytest.mark.parametrize("classes", [1, 2, 5, 250])
@pytest.mark.parametrize("block", [7, 2**15])
def test_sorting_float64_scores_with_their_classes(shape, classes, block, monkeypatch):
    monkeypatch.setattr(sorting, "BLOCK", block)
    scores = shape(torch.randn(301, dtype=torch.float64))
    numbers = torch.randint(classes, (301,), dtype=torch.uint8)
    ranked = sorting.sort_with(scores, numbers)
    distinct = sorted(set(scores.tolist()))
    assert ranked.scores.tolist() == distinct
    start = 0
    for score, end in zip(distinct, ranked.ends.tolist(), strict=True):
        assert sorted(ranked.numbers[start : end + 1].tolist()) == sorted(numbers[scores == score].tolist())
        start = end + 1
    assert start == 301


@pytest.mark.parametrize("metric", [F.auroc, F.aurc, F.average_precision, F.risk_coverage_curve])
def test_integers_that_float64_merges_are_refused(metric):
    target = torch.tensor([0, 1])
    for merged in (torch.tensor([2**53, 2**53 + 1]), torch.tensor([-(2**63), 1 - 2**63])):
        with pytest.raises(ValueError, match=r"2\^53 or more in magnitude"):
            metric(merged, target)
    assert float(F.auroc(torch.tensor([2**53 - 2, 2**53 - 1]), target)) == 1
    assert float(F.auroc(torch.tensor([2**53, 2**53 + 1]).unique(return_inverse=True)[1], target)) == 1
