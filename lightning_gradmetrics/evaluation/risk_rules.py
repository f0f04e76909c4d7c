"""Rules that bound the error rate among the accepted samples with a given confidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

from lightning_gradmetrics.evaluation.rules import Fit, Rule, RuleError, check_open

__all__ = ["ACCEPTS_ALL", "JointRisk", "LearnThenTest", "SelectiveRisk", "error_bounds"]

ACCEPTS_ALL = float(np.finfo(np.float64).max)
"""The threshold that accepts every finite score."""

LEVELS = 100
"""The number of thresholds that are tested in sequence."""

GRID = np.linspace(0.3, 1.0, 8)
"""The number of candidates for each of two thresholds that are tested together."""


@dataclass(frozen=True, repr=False)
class SelectiveRisk(Rule):
    """Accept as many samples as possible with an error rate among them of at most ``risk``, with confidence ``1 - delta``.

    A binary search over the rows tests ``ceil(log2 n)`` thresholds, each by Clopper and Pearson's bound at the level
    ``delta / ceil(log2 n)``.

    Args:
        risk: The largest error rate among the accepted samples, in (0, 1).
        delta: The probability that the guarantee fails.

    Example:
        >>> fitted = SelectiveRisk(0.05).fit(np.arange(400.0), np.arange(400) >= 300)
        >>> 0.7 < fitted.coverage < 0.8
        True

    Reference:
        Geifman, El-Yaniv: Selective Classification for Deep Neural Networks, NeurIPS 2017.
    """

    name = "selective_risk"
    risk: float = 0.05
    delta: float = 0.05
    needs_labels = True

    def __post_init__(self) -> None:
        check_open(risk=self.risk, delta=self.delta)

    def fit(self, scores: Any, incorrect: Any) -> Fit:
        """Return the largest tested threshold with the guarantee."""
        order = np.argsort(scores, kind="stable")
        ordered, errors = scores[order], np.cumsum(incorrect[order])
        tests = max(math.ceil(math.log2(len(scores))), 1)
        level = self.delta / tests
        low, high, best = 0, len(scores), 0
        for _ in range(tests):
            middle = math.ceil((low + high) / 2)
            accepted = _before_ties(ordered, middle)
            if accepted and error_bounds(int(errors[accepted - 1]), accepted, level)[1] <= self.risk:
                low, best = middle, max(best, accepted)
            else:
                high = middle
        if not best:
            raise RuleError(_unsupported(self, errors, level))
        return _below(ordered, best)

    def guarantee(self) -> str:
        """Return the guarantee in one sentence."""
        return _risk_guarantee(self.risk, self.delta)


@dataclass(frozen=True, repr=False)
class LearnThenTest(Rule):
    """The same guarantee as :class:`SelectiveRisk`, from a sequence of tests.

    One half of the rows, drawn by ``seed``, proposes 100 thresholds, and the one with the smallest p-value to start from. On
    the other half the thresholds are tested from there to the highest by an exact binomial test at the level ``delta``, up to
    the first that fails.

    Args:
        risk: The largest error rate among the accepted samples, in (0, 1).
        delta: The probability that the guarantee fails.
        seed: The seed of the split.

    Example:
        >>> fitted = LearnThenTest(0.05).fit(np.arange(800.0), np.arange(800) >= 600)
        >>> 0.7 < fitted.coverage < 0.8
        True

    Reference:
        Angelopoulos et al.: Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control, 2021.
    """

    name = "learn_then_test"
    risk: float = 0.05
    delta: float = 0.05
    seed: int = 0
    needs_labels = True

    def __post_init__(self) -> None:
        check_open(risk=self.risk, delta=self.delta)

    def fit(self, scores: Any, incorrect: Any) -> Fit:
        """Return the last threshold before the first failed test."""
        proposing = _half(len(scores), self.seed)
        grid = np.unique(np.quantile(scores[proposing], np.linspace(0, 1, LEVELS + 1)[1:]))
        tested, errors = scores[~proposing], incorrect[~proposing]
        proposed = [self._p_value(threshold, scores[proposing], incorrect[proposing]) for threshold in grid]
        best = None
        for threshold in grid[int(np.argmin(proposed)) :]:
            if self._p_value(threshold, tested, errors) > self.delta:
                break
            best = float(threshold)
        if best is None:
            order = np.argsort(tested, kind="stable")
            raise RuleError(_unsupported(self, np.cumsum(errors[order]), self.delta, split=2))
        return Fit(best, float((scores <= best).mean()))

    def _p_value(self, threshold: float, scores: Any, incorrect: Any) -> float:
        """The exact binomial p-value of the hypothesis that the error rate among the accepted rows exceeds the risk."""
        accepted = scores <= threshold
        return float(scipy.stats.binom.cdf(int(incorrect[accepted].sum()), int(accepted.sum()), self.risk))

    def guarantee(self) -> str:
        """Return the guarantee in one sentence."""
        return _risk_guarantee(self.risk, self.delta)


@dataclass(frozen=True)
class _PairTest:
    """The accepted correct, incorrect and out-of-distribution rows of a pair of thresholds, and all tested rows."""

    first: float
    second: float
    right: int
    wrong: int
    out: int
    inside: int
    outside: int


@dataclass(frozen=True, repr=False)
class JointRisk(Rule):
    """Accept a sample if both its error score and its OOD score pass, with bounded joint risk.

    The joint risk is the fraction of accepted samples that are incorrect or out-of-distribution, in a mixture with the
    fraction ``ood_share`` of out-of-distribution samples. One half of the rows proposes 8 x 8 pairs of thresholds. The
    other half bounds the risk of each pair by Clopper and Pearson's bounds, which hold together with confidence
    ``1 - delta``.

    Args:
        risk: The largest joint risk, in (0, 1).
        delta: The probability that the guarantee fails.
        ood_share: The fraction of out-of-distribution samples in the mixture.
        seed: The seed of the split.

    Example:
        >>> JointRisk(0.1).guarantee()
        'at most 10 % of the accepted samples are incorrect or OOD if 50 % of all samples are OOD, with confidence 95 %'

    Reference:
        Angelopoulos et al.: Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control, 2021.
    """

    name = "joint_risk"
    risk: float = 0.1
    delta: float = 0.05
    ood_share: float = 0.5
    seed: int = 0
    needs_labels = True

    def __post_init__(self) -> None:
        check_open(risk=self.risk, delta=self.delta, ood_share=self.ood_share)

    def fit_pair(self, scores: Sequence[Any], incorrect: Any, is_ood: Any) -> tuple[Fit, Fit]:
        """Return the pair of thresholds that accepts the most correct rows, among those whose bound is below the risk.

        Args:
            scores: The error score and the OOD score, ``(N,)`` each.
            incorrect: ``(N,)`` bool; ignored for out-of-distribution rows.
            is_ood: ``(N,)`` bool.
        """
        proposing = _half(len(is_ood), self.seed)
        correct = ~is_ood & ~incorrect
        if not (correct & proposing).any() or not (is_ood & ~proposing).any() or not (~is_ood & ~proposing).any():
            raise RuleError(
                f"{self!r} needs correct in-distribution rows and out-of-distribution rows in both halves: there are "
                f"{int(correct.sum())} and {int(is_ood.sum())} rows, and about {self._fewest()} of each would be enough without "
                "accepted errors"
            )
        firsts, seconds = (np.quantile(column[correct & proposing], GRID) for column in scores)
        inside, outside = int((~is_ood & ~proposing).sum()), int((is_ood & ~proposing).sum())
        tests: list[_PairTest] = []
        for first in firsts:
            for second in seconds:
                accepted = (scores[0] <= first) & (scores[1] <= second) & ~proposing
                right, out = int((accepted & correct).sum()), int((accepted & is_ood).sum())
                wrong = int(accepted.sum()) - right - out
                tests.append(_PairTest(float(first), float(second), right, wrong, out, inside, outside))
        supported = [test for test in tests if self._bound(test) <= self.risk]
        if not supported:
            raise RuleError(self._unsupported(tests, len(is_ood)))
        best = max(supported, key=lambda test: (test.right, test.first, test.second))
        pair = []
        for column, threshold in zip(scores, (best.first, best.second), strict=True):
            pair.append(Fit(threshold, float((column[~is_ood] <= threshold).mean())))
        return pair[0], pair[1]

    def _bound(self, test: _PairTest, factor: float = 1.0) -> float:
        """Return an upper bound of the joint risk of one pair, as if there were ``factor`` times as many rows."""
        level = self.delta / (3 * len(GRID) ** 2)
        inside, outside = factor * test.inside, factor * test.outside
        wrong = error_bounds(factor * test.wrong, inside, level)[1]
        right = error_bounds(factor * test.right, inside, level)[0]
        out = error_bounds(factor * test.out, outside, level)[1]
        return self._joint_risk(wrong, right, out)

    def _fewest(self) -> int:
        """The rows of each kind that support the rule if no error and no out-of-distribution row is accepted."""
        for number in 2 ** np.arange(1, 31):
            if self._bound(_PairTest(0.0, 0.0, int(number), 0, 0, int(number), int(number))) <= self.risk:
                return 2 * int(number)
        return 2**31

    def _joint_risk(self, wrong: float, right: float, out: float) -> float:
        """The joint risk from the accepted fractions of incorrect, correct and out-of-distribution samples."""
        bad = (1 - self.ood_share) * wrong + self.ood_share * out
        accepted = bad + (1 - self.ood_share) * right
        return float(bad / accepted) if accepted else 1.0

    def _unsupported(self, tests: Sequence[_PairTest], rows: int) -> str:
        """Return why no pair qualifies, and how many similar rows would be enough."""
        risks = []
        for test in tests:
            shares = (test.wrong / test.inside, test.right / test.inside, test.out / test.outside)
            risks.append(self._joint_risk(*shares))
        if min(risks) >= self.risk:
            return (
                f"no pair of thresholds supports {self!r}: the joint risk is at least {min(risks):.3f} for every pair, so no "
                "number of rows would be enough; allow a larger risk"
            )
        for factor in 2.0 ** np.arange(1, 20):
            if min(self._bound(test, factor) for test in tests) <= self.risk:
                return (
                    f"{rows} rows cannot support {self!r}: about {int(factor * rows)} rows like these would be enough; the "
                    f"lowest bound of the joint risk is {min(map(self._bound, tests)):.3f}"
                )
        return f"no pair of thresholds supports {self!r}; allow a larger risk"

    def guarantee(self) -> str:
        """Return the guarantee in one sentence."""
        return (
            f"at most {100 * self.risk:g} % of the accepted samples are incorrect or OOD if {100 * self.ood_share:g} % of "
            f"all samples are OOD, with confidence {100 * (1 - self.delta):g} %"
        )


def error_bounds(errors: float, number: float, level: float) -> tuple[float, float]:
    """Return Clopper and Pearson's lower and upper bound of a rate, each with confidence ``1 - level``.

    Example:
        >>> round(error_bounds(0, 58, 0.05)[1], 3)
        0.05
    """
    low = float(scipy.stats.beta.ppf(level, errors, number - errors + 1)) if errors else 0.0
    high = float(scipy.stats.beta.ppf(1 - level, errors + 1, number - errors)) if errors < number else 1.0
    return low, high


def _half(number: int, seed: int) -> Any:
    """Return a random half of the rows, ``(N,)`` bool."""
    return np.random.default_rng(seed).permutation(number) < number // 2


def _before_ties(ordered: Any, number: int) -> int:
    """Return the number of rows below the score of row ``number``; all rows if there is no such row."""
    if number == len(ordered):
        return number
    return int(np.searchsorted(ordered, ordered[number], side="left"))


def _below(ordered: Any, accepted: int) -> Fit:
    """Return the threshold just below the first rejected score."""
    coverage = accepted / len(ordered)
    if accepted == len(ordered):
        return Fit(ACCEPTS_ALL, coverage)
    return Fit(float(np.nextafter(ordered[accepted], -np.inf)), coverage)


def _risk_guarantee(risk: float, delta: float) -> str:
    return f"at most {100 * risk:g} % of the accepted samples are errors, with confidence {100 * (1 - delta):g} %"


def _unsupported(rule: SelectiveRisk | LearnThenTest, errors: Any, level: float, split: int = 1) -> str:
    """Return why no threshold qualifies, and how many similar rows would be enough."""
    number = np.arange(1, len(errors) + 1)
    rates = errors / number
    if not (rates < rule.risk).any():
        return (
            f"no threshold supports {rule!r}: the error rate is at least {rates.min():.3f} at every coverage, so no "
            "number of rows would be enough; allow a larger risk"
        )
    for factor in 2.0 ** np.arange(1, 20):
        bounds = scipy.stats.beta.ppf(1 - level, factor * errors + 1, np.maximum(factor * (number - errors), 1e-9))
        if (bounds <= rule.risk).any():
            return (
                f"{split * len(errors)} rows cannot support {rule!r}: about {int(split * factor * len(errors))} rows like "
                "these would be enough"
            )
    return f"no threshold supports {rule!r}; allow a larger risk"
