"""Metrics of selective prediction: the errors that remain when the most uncertain samples are rejected.

Samples are accepted in ascending order of their score; target 1 is an error. Every metric is averaged over all orders
of tied samples, so it does not depend on the order in which the samples are stored.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lightning_gradmetrics.meters.functional.counts import Counts, announce_undefined, check_rate, count, dot, real

__all__ = [
    "accuracy_at_coverage",
    "accuracy_at_coverage_of_counts",
    "augrc",
    "augrc_of_counts",
    "aurc",
    "aurc_of_counts",
    "coverage_at_risk",
    "coverage_at_risk_of_counts",
    "e_aurc",
    "e_aurc_of_counts",
    "harmonic",
    "harmonic_table",
    "oracle_counts",
    "risk_coverage_curve",
    "risk_coverage_curve_of_counts",
]

SOME = "at least one sample"
TABLE_LIMIT = 2**24
TINY = torch.finfo(torch.float64).tiny
EULER = 0.5772156649015329


def harmonic(number: Tensor, largest: Tensor | None = None) -> Tensor:
    """Return harmonic numbers ``H_n = sum_{k<=n} 1/k`` in float64, interpolated linearly between whole numbers.

    Args:
        number: ``(...)``, at least 0.
        largest: Any numbers, at least one of which is as large as the largest ``number``; by default, ``number``.
    """
    largest = number if largest is None else largest
    size = int(largest.max()) + 1 if largest.numel() else 0
    whole = number.floor() if number.is_floating_point() else number
    if size > TABLE_LIMIT:
        values = torch.digamma(whole.double() + 1) + EULER
    else:
        values = _looked_up(harmonic_table(size, number.device), whole.int())  # TABLE_LIMIT is below 2^31
    if not number.is_floating_point():
        return values
    fraction = number - whole
    return values.add_(fraction.div_(whole.add_(1))) if bool(fraction.sum()) else values


def _looked_up(table: Tensor, places: Tensor) -> Tensor:
    """Return the elements of a table ``(T,)`` at the given places ``(...)``, in the memory layout of the places."""
    if places.ndim == 2 and not places.is_contiguous() and places.mT.is_contiguous():
        return _looked_up(table, places.mT).mT
    return table.index_select(0, places.reshape(-1)).view(places.shape)


def harmonic_table(largest: int, device: torch.device) -> Tensor:
    """Return the harmonic numbers from 0 to ``largest`` or more; ``largest`` is at most ``TABLE_LIMIT``."""
    return _harmonic_table(min(1 << largest.bit_length(), TABLE_LIMIT + 1), device)


@lru_cache(maxsize=2)
def _harmonic_table(size: int, device: torch.device) -> Tensor:
    """Return the harmonic numbers below ``size``; sizes are powers of two so that few tables are cached."""
    table = torch.arange(size, device=device, dtype=torch.float64)
    table[1:] = table[1:].reciprocal()
    return table.cumsum(0)


def aurc(scores: Tensor, target: Tensor) -> Tensor:
    r"""Area under the risk-coverage curve: the mean over ``k`` of the error rate among the ``k`` most certain samples.

    ``AURC = 1/N sum_k E_k / k``, where ``E_k`` is the number of errors among the ``k`` lowest scores, averaged over all
    orders of ties.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign, including infinities; NaN is refused.
        target: ``(N,)``, 1 = the prediction is incorrect, 0 = it is correct.

    Returns:
        A scalar in [0, 1], lower is better. 0 without errors; NaN with a UserWarning if there is no sample.

    Raises:
        ValueError: If a shape or a value is wrong.

    Example:
        >>> aurc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0])), aurc(torch.zeros(2), torch.tensor([0, 1]))
        (tensor(0.2778), tensor(0.5000))

    Reference:
        Geifman, Uziel, El-Yaniv: Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers, ICLR 2019.
    """
    return announce_undefined(aurc_of_counts(count(scores, target)), "AURC", SOME)


def aurc_of_counts(counts: Counts) -> Tensor:
    r"""Return the AURC of counts, ``(...)`` in float64; NaN without samples.

    An error that is the ``k``-th accepted sample counts in the risk at ``k`` and at every larger coverage, so it adds
    ``H_N - H_{k-1}`` to the sum. In a group of ``m`` ties that ends at the ``b``-th sample, the mean of ``H_{k-1}`` over
    the group is ``H_{b-m} + b (H_b - H_{b-m}) / m - 1``.
    """
    if "aurc" not in counts.known:
        counts.known["aurc"] = _aurc(counts)
    return counts.known["aurc"]


def _aurc(counts: Counts) -> Tensor:
    sums = counts.at_positives
    samples = counts.positives + counts.negatives
    ends = sums.positives_to + sums.negatives_to
    size = sums.positive + sums.negative
    end = harmonic(ends, samples)
    # If every group is present, a group starts where the one before it ends.
    start = torch.nn.functional.pad(end, (1, 0))[..., :-1] if sums.complete else harmonic(ends - size, samples)
    if not sums.tied:  # the terms of the mean, times the number of errors, which is the size of their group
        total = dot(sums.positive, start) + dot(ends, end - start) - counts.positives
        return (counts.positives * harmonic(samples) - total) / samples
    mean = (end - start).mul_(ends).div_(size.clamp(min=TINY)).add_(start).sub_(1)
    return dot(sums.positive, harmonic(samples)[..., None] - mean) / samples


def oracle_counts(counts: Counts) -> Counts:
    """Return the counts of a perfect score, which ranks all correct predictions below all errors."""
    none = torch.zeros_like(counts.negatives)
    order = torch.arange(2, dtype=torch.float64, device=none.device)
    return Counts.of(order, torch.stack([counts.negatives, none], -1), torch.stack([none, counts.positives], -1))


def e_aurc(scores: Tensor, target: Tensor) -> Tensor:
    """Excess AURC: the AURC minus that of a perfect score with the same number of errors.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign, including infinities; NaN is refused.
        target: ``(N,)``, 1 = the prediction is incorrect, 0 = it is correct.

    Returns:
        A scalar in [0, 1], lower is better, 0 for a perfect ranking. NaN with a UserWarning if there is no sample.

    Raises:
        ValueError: If a shape or a value is wrong.

    Example:
        >>> e_aurc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]))
        tensor(0.)

    Reference:
        Geifman, Uziel, El-Yaniv: Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers, ICLR 2019.
    """
    return announce_undefined(e_aurc_of_counts(count(scores, target)), "E-AURC", SOME)


def e_aurc_of_counts(counts: Counts, area: Tensor | None = None) -> Tensor:
    """Return the excess AURC of counts, ``(...)``, from their AURC if it is known; NaN without samples."""
    area = aurc_of_counts(counts) if area is None else area
    return (area - aurc_of_counts(oracle_counts(counts))).clamp(min=0)


def augrc(scores: Tensor, target: Tensor) -> Tensor:
    r"""Area under the generalised risk-coverage curve: the mean rate of undetected errors over all coverages.

    The generalised risk at a coverage is the fraction of *all* samples that are accepted and incorrect. With error rate
    ``r``, ``AUGRC = r (1 - r) (1 - AUROC) + r^2 / 2``.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign, including infinities; NaN is refused.
        target: ``(N,)``, 1 = the prediction is incorrect, 0 = it is correct.

    Returns:
        A scalar in [0, 1/2], lower is better. NaN with a UserWarning if there is no sample.

    Raises:
        ValueError: If a shape or a value is wrong.

    Example:
        >>> augrc(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]))
        tensor(0.1250)

    Reference:
        Traub et al.: Overcoming Common Flaws in the Evaluation of Selective Classification Systems, NeurIPS 2024.
    """
    return announce_undefined(augrc_of_counts(count(scores, target)), "AUGRC", SOME)


def augrc_of_counts(counts: Counts) -> Tensor:
    """Return the AUGRC of counts, ``(...)`` in float64; NaN without samples.

    Each error adds the fraction of samples accepted after it, with ties counted as one half. Together these are half
    of all pairs of errors, plus the pairs of an error and a correct prediction with a higher score.
    """
    samples = counts.positives + counts.negatives
    after = counts.positives.square() / 2 + counts.positives * counts.negatives - counts.pairs
    return after / samples.square()


def risk_coverage_curve(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the risk-coverage curve, one point per distinct score.

    A sample is accepted if its score is at most the threshold.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign, including infinities; NaN is refused.
        target: ``(N,)``, 1 = the prediction is incorrect, 0 = it is correct.

    Returns:
        Coverage (the fraction accepted), risk (the error rate of the accepted samples) and thresholds, ``(G,)`` each,
        in ascending order; empty with a UserWarning without samples.

    Raises:
        ValueError: If a shape or a value is wrong.

    Example:
        >>> risk_coverage_curve(torch.tensor([-1.0, 5.0, 5.0, 7.0]), torch.tensor([0, 1, 0, 1]))
        (tensor([0.2500, 0.7500, 1.0000]), tensor([0.0000, 0.3333, 0.5000]), tensor([-1.,  5.,  7.]))
    """
    return risk_coverage_curve_of_counts(count(scores, target))


def risk_coverage_curve_of_counts(counts: Counts) -> tuple[Tensor, Tensor, Tensor]:
    """Return the risk-coverage curve of counts, in float32."""
    if not len(counts.scores):
        announce_undefined(torch.tensor(torch.nan), "the risk-coverage curve", SOME)
    coverage = counts.samples_to / counts.samples_to[-1:]
    return coverage.float(), (counts.positives_to / counts.samples_to).float(), counts.scores


def accuracy_at_coverage(scores: Tensor, target: Tensor, coverage: float = 0.9) -> Tensor:
    """Return the accuracy on the ``ceil(coverage * N)`` lowest scores, averaged over all orders of ties.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign, including infinities; NaN is refused.
        target: ``(N,)``, 1 = the prediction is incorrect, 0 = it is correct.
        coverage: The fraction of samples to accept, in (0, 1].

    Returns:
        A scalar in [0, 1], higher is better. NaN with a UserWarning if there is no sample.

    Raises:
        ValueError: If a shape or a value is wrong.

    Example:
        >>> accuracy_at_coverage(torch.tensor([1.0, 2.0, 2.0, 9.0]), torch.tensor([0, 1, 0, 1]), coverage=0.5)
        tensor(0.7500)
    """
    value = accuracy_at_coverage_of_counts(count(scores, target), coverage)
    return announce_undefined(value, "accuracy at coverage", SOME)


def accuracy_at_coverage_of_counts(counts: Counts, coverage: float = 0.9) -> Tensor:
    """Return the accuracy at a coverage of counts ``(G,)``, in float64; NaN without samples."""
    check_rate(coverage, "coverage")
    size = real(counts.positive + counts.negative)
    wanted = torch.ceil(size.sum() * coverage * (1 - 1e-12))
    accepted = torch.minimum(size, (wanted - (counts.samples_to - size)).clamp(min=0))
    return 1 - (accepted * counts.positive / size.clamp(min=1)).sum() / wanted


def coverage_at_risk(scores: Tensor, target: Tensor, risk: float = 0.05) -> Tensor:
    """Return the largest fraction of samples that a threshold accepts with an error rate of at most ``risk``.

    A threshold accepts or rejects tied samples together.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign, including infinities; NaN is refused.
        target: ``(N,)``, 1 = the prediction is incorrect, 0 = it is correct.
        risk: The largest allowed error rate of the accepted samples, in (0, 1].

    Returns:
        A scalar in [0, 1], higher is better; 0 if no threshold is good enough. NaN with a UserWarning if there is no
        sample.

    Raises:
        ValueError: If a shape or a value is wrong.

    Example:
        >>> coverage_at_risk(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 1, 0]), risk=0.3)
        tensor(1.)
    """
    return announce_undefined(coverage_at_risk_of_counts(count(scores, target), risk), "coverage at risk", SOME)


def coverage_at_risk_of_counts(counts: Counts, risk: float = 0.05) -> Tensor:
    """Return the coverage at a risk of counts ``(G,)``, in float64; NaN without samples."""
    check_rate(risk, "risk")
    accepted = counts.samples_to
    good = counts.positives_to <= risk * accepted * (1 + 1e-12)
    return torch.cat([accepted.new_zeros(1), torch.where(good, accepted, 0)]).amax() / (
        counts.positives + counts.negatives
    )
