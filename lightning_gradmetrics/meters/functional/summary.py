"""Descriptions of scores: distribution, rank correlation and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_gradmetrics.meters.functional.counts import announce_undefined, check_scores, check_target, check_tensor

__all__ = [
    "QUANTILES",
    "calibration_error",
    "check_n_bins",
    "check_norm",
    "check_quantiles",
    "distribution",
    "distribution_of_counts",
    "spearman",
]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
Norm = Literal["l1", "l2", "max"]


def check_quantiles(quantiles: Sequence[float]) -> tuple[float, ...]:
    """Return quantiles, checked.

    Raises:
        ValueError: If one is outside [0, 1].
    """
    if any(isinstance(q, bool) or not 0 <= q <= 1 for q in quantiles):
        raise ValueError(f"quantiles must be in [0, 1], got {tuple(quantiles)}")
    return tuple(float(q) for q in quantiles)


def distribution(scores: Tensor, quantiles: Sequence[float] = QUANTILES) -> dict[str, Tensor]:
    """Return count, non-finite count, mean, standard deviation, minimum, maximum and quantiles of a score.

    Args:
        scores: ``(N,)``; NaN and infinities are counted as ``non_finite`` and otherwise ignored.
        quantiles: The quantiles to compute, in [0, 1], interpolated between two scores.

    Returns:
        ``count`` (of finite scores), ``non_finite``, ``mean``, ``std`` (unbiased), ``min``, ``max``, and ``q<percent>``
        for each quantile, as scalars. Without a finite score, everything but the counts is NaN, with a UserWarning; so
        is ``std`` of a single score.

    Raises:
        TypeError: If the scores are not a tensor of real numbers.
        ValueError: If the shape or a quantile is wrong.

    Example:
        >>> distribution(torch.tensor([1.0, 3.0, torch.inf]), quantiles=[0.5])["q50"]
        tensor(2.)
    """
    check_tensor(scores, "scores")
    finite = torch.isfinite(scores)
    finite_scores = check_scores(scores if scores.ndim != 1 else scores[finite])
    distinct, number = torch.unique(finite_scores, return_counts=True)
    return distribution_of_counts(distinct, number, torch.tensor(len(scores) - len(finite_scores)), quantiles)


def distribution_of_counts(
    distinct: Tensor, number: Tensor, non_finite: Tensor, quantiles: Sequence[float] = QUANTILES
) -> dict[str, Tensor]:
    """Return the distribution of distinct finite scores in ascending order, given the number of samples with each."""
    values, total = distinct.double(), number.sum()
    largest = values.abs().amax() if len(values) else values.new_zeros(())
    exponent = 2.0 ** torch.frexp(largest).exponent.clamp(-1000, 1000).double()
    # Scaled by a power of two, so that squares of very large or small scores neither overflow nor underflow.
    scaled = values / exponent
    mean = (scaled * number).sum() / total
    variance = ((scaled - mean).square() * number).sum() / (total - 1).clamp(min=0)
    numbers = {"mean": mean * exponent, "std": variance.sqrt() * exponent}
    numbers |= {"min": _quantile(values, number, 0.0), "max": _quantile(values, number, 1.0)}
    numbers |= {f"q{100 * q:.12g}": _quantile(values, number, q) for q in check_quantiles(quantiles)}
    announce_undefined(torch.stack(list(numbers.values())), "a score's distribution", "at least two finite scores")
    return {
        "count": total,
        "non_finite": non_finite.to(total.device),
        **{k: v.to(distinct.dtype) for k, v in numbers.items()},
    }


def _quantile(values: Tensor, number: Tensor, quantile: float) -> Tensor:
    if not len(values):
        return values.new_tensor(torch.nan)
    position = quantile * float(number.sum() - 1)
    ranks = torch.tensor([int(position), -int(-position // 1)], device=values.device)
    low, high = values[torch.searchsorted(number.cumsum(0), ranks, right=True)]
    weight = position - int(position)
    value = torch.lerp(low, high, weight)
    if bool(torch.isfinite(value)):
        return value
    # The difference of two finite numbers was infinite.
    return 2 * torch.lerp(low / 2, high / 2, weight)


def spearman(scores: Tensor) -> Tensor:
    """Return Spearman's rank correlation of every pair of scores: Pearson's correlation of the ranks; ties share a mean rank.

    Args:
        scores: ``(N, S)``, one column per score, any scale and sign, including infinities; NaN is refused.

    Returns:
        ``(S, S)`` in [-1, 1]. NaN with a UserWarning for a score that is constant, or if there are fewer than two
        samples.

    Raises:
        TypeError: If it is not a tensor of real numbers.
        ValueError: If the shape is wrong, or a score is NaN.

    Example:
        >>> spearman(torch.tensor([[1.0, -10.0], [2.0, -100.0], [3.0, -1000.0]]))
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    check_tensor(scores, "scores")
    if scores.ndim != 2:
        raise ValueError(f"scores must have the shape (N, S), got {tuple(scores.shape)}")
    ranks = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
    for column in range(scores.shape[1]):
        ranks[:, column] = _mean_ranks(check_scores(scores[:, column]))
    centred = ranks - ranks.mean(0)
    covariance = centred.T @ centred
    scale = covariance.diagonal().sqrt()
    value = (covariance / scale.outer(scale)).clamp(-1, 1)
    return announce_undefined(value, "Spearman's correlation", "scores that are not all equal")


def _mean_ranks(scores: Tensor) -> Tensor:
    _, group, size = torch.unique(scores, return_inverse=True, return_counts=True)
    ranks: Tensor = size.cumsum(0).double() - (size - 1) / 2
    return ranks[group]


def check_norm(norm: Norm) -> Norm:
    """Return the norm of the calibration error, checked.

    Raises:
        ValueError: If it is none of ``"l1"``, ``"l2"`` and ``"max"``.
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be 'l1', 'l2' or 'max', got {norm!r}")
    return norm


def check_n_bins(n_bins: int) -> int:
    """Return a number of bins, checked.

    Raises:
        ValueError: If it is not a whole number of at least 1.
    """
    if not isinstance(n_bins, int) or isinstance(n_bins, bool) or n_bins < 1:
        raise ValueError(f"n_bins must be a whole number of at least 1, got {n_bins!r}")
    return n_bins


def calibration_error(probability: Tensor, target: Tensor, n_bins: int = 15, norm: Norm = "l1") -> Tensor:
    """Return the expected calibration error: the distance of probabilities to the rate of positives, over equal-width bins.

    Args:
        probability: ``(N,)`` in [0, 1], the probability that the sample is positive. Scores outside [0, 1] are
            refused.
        target: ``(N,)``, 1 = an error or out-of-distribution, 0 = any other sample.
        n_bins: The number of bins; a probability of 1 is in the last one.
        norm: ``"l1"`` the mean distance, ``"l2"`` the root mean square, ``"max"`` the largest.

    Returns:
        A scalar in [0, 1], lower is better. NaN with a UserWarning if there is no sample.

    Raises:
        ValueError: If a probability is outside [0, 1], or another argument is wrong.

    Example:
        >>> calibration_error(torch.tensor([0.1, 0.9, 0.9, 0.1]), torch.tensor([0, 1, 1, 0]))
        tensor(0.1000)

    Reference:
        Naeini, Cooper, Hauskrecht: Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI 2015.
    """
    probability = check_scores(probability, "probability")
    target = check_target(target, probability)
    check_n_bins(n_bins)
    check_norm(norm)
    if not len(probability):
        return announce_undefined(probability.new_tensor(torch.nan), "calibration error", "at least one sample")
    if bool((probability < 0).any() | (probability > 1).any()):
        raise ValueError(
            "probabilities must be in [0, 1]: raw scores are not calibrated, but fitted detectors return probabilities"
        )
    return _distance(*_bin_sums(probability.double(), target, n_bins), norm).to(torch.float32)


def _bin_sums(probability: Tensor, target: Tensor, n_bins: int) -> tuple[Tensor, Tensor]:
    """Return the number of samples in each bin ``(n_bins,)``, and the sum of ``probability - target`` there; 1 is in the last bin."""
    ends = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64, device=probability.device)
    bins = torch.bucketize(probability, ends[1:-1], right=True)
    number, excess = probability.new_zeros(2, n_bins)
    number.index_add_(0, bins, torch.ones_like(probability))
    excess.index_add_(0, bins, probability - target.double())
    return number, excess


def _distance(number: Tensor, excess: Tensor, norm: Norm) -> Tensor:
    """Return the norm over the bins of the mean distance in each."""
    share, distance = number / number.sum(), excess.abs() / number.clamp(min=1)
    if norm == "max":
        return distance.amax()
    return (share * distance).sum() if norm == "l1" else (share * distance.square()).sum().sqrt()
