"""Rules that fit a threshold on held-out rows, with guarantees on the fraction of accepted samples."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import scipy

from lightning_gradmetrics.meters.functional.counts import check_rate

__all__ = ["Conformal", "Coverage", "Fit", "Rule", "RuleError", "TruePositiveRate", "check_open"]


class RuleError(ValueError):
    """The data cannot support a rule; the message states how many rows would."""


@dataclass(frozen=True)
class Fit:
    """A fitted threshold.

    Args:
        threshold: A row is accepted if its score does not exceed it.
        coverage: The fraction of the fitted in-distribution rows that it accepts.
    """

    threshold: float
    coverage: float


@dataclass(frozen=True, repr=False)
class Rule:
    """The base of all rules."""

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = False

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in asdict(self).items())
        return f"{self.name}({arguments})"

    def fit(self, scores: Any, incorrect: Any) -> Fit:
        """Fit a threshold to scores ``(N,)`` and, if the rule needs it, to which predictions are incorrect ``(N,)``."""
        raise NotImplementedError

    def guarantee(self) -> str:
        """Return the guarantee in one sentence."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return the rule's name and arguments."""
        return {"name": self.name, **asdict(self)}


def _at_rank(scores: Any, rank: int) -> Fit:
    """Return the threshold at the ``rank``-th lowest score, counted from 1."""
    threshold = float(np.partition(scores, rank - 1)[rank - 1])
    return Fit(threshold, float((scores <= threshold).mean()))


@dataclass(frozen=True, repr=False)
class TruePositiveRate(Rule):
    """Accept at least a given fraction of the fitted in-distribution rows, without a guarantee for other rows.

    Args:
        tpr: The fraction to accept, in (0, 1].

    Example:
        >>> TruePositiveRate(0.75).fit(np.array([0.1, 0.2, 0.3, 9.0]), None).threshold
        0.3
    """

    name = "true_positive_rate"
    tpr: float = 0.95

    def __post_init__(self) -> None:
        check_rate(self.tpr, "tpr")

    def fit(self, scores: Any, incorrect: Any = None) -> Fit:
        """Return the lowest threshold that accepts the fraction."""
        return _at_rank(scores, max(math.ceil(self.tpr * len(scores) * (1 - 1e-12)), 1))

    def guarantee(self) -> str:
        """Return the guarantee in one sentence."""
        return f"at least {100 * self.tpr:g} % of the fitted in-distribution rows are accepted"


@dataclass(frozen=True, repr=False)
class Coverage(Rule):
    """Accept at least a given fraction of all in-distribution samples, with confidence ``1 - delta``.

    The coverage of the ``k``-th lowest of ``n`` scores has the distribution ``Beta(k, n - k + 1)``.

    Args:
        coverage: The fraction to accept, in (0, 1).
        delta: The probability that the guarantee fails.

    Example:
        >>> Coverage(0.9, delta=0.05).fit(np.arange(100.0), None).threshold
        95.0

    Reference:
        Wilks: Determination of Sample Sizes for Setting Tolerance Limits, Annals of Mathematical Statistics 1941.
    """

    name = "coverage"
    coverage: float = 0.95
    delta: float = 0.05

    def __post_init__(self) -> None:
        check_open(coverage=self.coverage, delta=self.delta)

    def fit(self, scores: Any, incorrect: Any = None) -> Fit:
        """Return the lowest threshold with the guarantee."""
        rank = int(scipy.stats.binom.ppf(1 - self.delta, len(scores), self.coverage)) + 1
        if rank > len(scores):
            needed = math.ceil(math.log(self.delta) / math.log(self.coverage))
            raise RuleError(f"{self!r} needs at least {needed} rows, got {len(scores)}")
        return _at_rank(scores, rank)

    def guarantee(self) -> str:
        """Return the guarantee in one sentence."""
        return (
            f"at least {100 * self.coverage:g} % of in-distribution samples are accepted, with confidence "
            f"{100 * (1 - self.delta):g} %"
        )


@dataclass(frozen=True, repr=False)
class Conformal(Rule):
    """Reject a new in-distribution sample with probability at most ``alpha``, by its conformal p-value.

    Args:
        alpha: The largest probability of rejecting an in-distribution sample, over the random fit data and the sample.

    Example:
        >>> Conformal(0.1).fit(np.arange(99.0), None).threshold
        89.0

    Reference:
        Bates et al.: Testing for Outliers with Conformal p-values, Annals of Statistics 2023.
    """

    name = "conformal"
    alpha: float = 0.05

    def __post_init__(self) -> None:
        check_open(alpha=self.alpha)

    def fit(self, scores: Any, incorrect: Any = None) -> Fit:
        """Return the largest threshold whose p-value exceeds ``alpha``."""
        rejected = math.floor(self.alpha * (len(scores) + 1) + 1e-9)
        if not rejected:
            needed = math.ceil(1 / self.alpha - 1 - 1e-9)
            raise RuleError(f"{self!r} needs at least {needed} rows, got {len(scores)}")
        return _at_rank(scores, len(scores) + 1 - rejected)

    def guarantee(self) -> str:
        """Return the guarantee in one sentence."""
        return f"an in-distribution sample is rejected with probability at most {self.alpha:g}"


def check_open(**values: float) -> None:
    """Refuse values outside (0, 1)."""
    for name, value in values.items():
        if check_rate(value, name) == 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
