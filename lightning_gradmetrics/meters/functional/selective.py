"""Selective prediction: what the error rate is when the most uncertain samples are rejected.

Samples are accepted in ascending order of their score; target 1 is an error. Tied samples have no order among
themselves, so within a tie group every metric takes the mean over all orders: the result does not depend on how the
samples were stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradmetrics.meters.functional.counts import Counts, announce_undefined, check_rate, count, real

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
    "harmonic_steps",
    "oracle_counts",
    "risk_coverage_curve",
    "risk_coverage_curve_of_counts",
]

SOME = "at least one sample"
TABLE_LIMIT = 2**22


def harmonic_steps(ends: Tensor, offset: Tensor | int = 0) -> Tensor:
    """Steps of the harmonic numbers ``H_n = sum_{k<=n} 1/k``: from 0 to the first end, and on from end to end.

    Args:
        ends: ``(..., G)``, ascending whole numbers.
        offset: A whole number that is added to all of them, and to the 0.
    """
    bounds = (torch.nn.functional.pad(ends, (1, 0)) + offset).long()
    largest = int(bounds[..., -1].max()) if bounds.numel() else 0
    if largest <= TABLE_LIMIT:
        table = torch.arange(largest + 1, device=ends.device, dtype=torch.float64)
        table[1:] = table[1:].reciprocal()
        return table.cumsum(0)[bounds].diff(dim=-1)
    # A step of one sample is 1/b exactly, where the difference of two logarithms would lose digits.
    steps = torch.digamma(bounds.double() + 1).diff(dim=-1)
    return torch.where(bounds.diff(dim=-1) == 1, 1 / bounds[..., 1:].double(), steps)


def aurc(scores: Tensor, target: Tensor) -> Tensor:
    r"""Area under the risk-coverage curve: the mean over ``k`` of the error rate among the ``k`` most certain samples.

    ``AURC = 1/N sum_k E_k / k``, where ``E_k`` counts the errors among the ``k`` lowest scores, in the mean over all
    orders of ties.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign; infinities rank, NaN is refused.
        target: ``(N,)``, 1 = the prediction is wrong, 0 = it is right.

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
    r"""AURC of counts, ``(...)`` in float64; NaN without samples.

    Within a group of ``m`` ties, ``d`` of them errors, after ``c`` samples with ``e`` errors, the expected number of
    errors grows by ``d/m`` a sample, so the group adds ``sum_{j<=m} (e + j d/m) / (c + j) = d + (e - c d/m) (H_{c+m}
    - H_c)``.
    """
    errors, before = counts.positive, torch.nn.functional.pad(counts.samples_to, (1, 0))[..., :-1]
    slope = errors / (errors + counts.negative).clamp(min=1)
    steps = harmonic_steps(counts.samples_to)
    return (errors + (counts.positives_to - errors - before * slope) * steps).sum(-1) / (
        counts.positives + counts.negatives
    )


def oracle_counts(counts: Counts) -> Counts:
    """The counts of a perfect score: all right predictions below all errors."""
    none = torch.zeros_like(counts.negatives)
    order = torch.arange(2, dtype=counts.scores.dtype, device=counts.scores.device)
    return Counts(order, torch.stack([counts.negatives, none], -1), torch.stack([none, counts.positives], -1))


def e_aurc(scores: Tensor, target: Tensor) -> Tensor:
    """Excess AURC: AURC less that of a perfect score with as many errors.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign; infinities rank, NaN is refused.
        target: ``(N,)``, 1 = the prediction is wrong, 0 = it is right.

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
    """Excess AURC of counts, ``(...)``, from their AURC where that is known; NaN without samples."""
    area = aurc_of_counts(counts) if area is None else area
    return (area - aurc_of_counts(oracle_counts(counts))).clamp(min=0)


def augrc(scores: Tensor, target: Tensor) -> Tensor:
    r"""Area under the generalised risk-coverage curve: the mean rate of undetected errors over all coverages.

    The generalised risk at a coverage is the share of *all* samples that are accepted and wrong. With error rate ``r``,
    ``AUGRC = r (1 - r) (1 - AUROC) + r^2 / 2``.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign; infinities rank, NaN is refused.
        target: ``(N,)``, 1 = the prediction is wrong, 0 = it is right.

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
    """AUGRC of counts by the trapezoidal rule, ``(...)`` in float64; NaN without samples."""
    size = counts.positive + counts.negative
    return (size * (counts.positives_to - counts.positive / 2)).sum(-1) / (counts.positives + counts.negatives).square()


def risk_coverage_curve(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The risk-coverage curve: a point for each distinct score.

    A sample is accepted where its score is at most the threshold.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign; infinities rank, NaN is refused.
        target: ``(N,)``, 1 = the prediction is wrong, 0 = it is right.

    Returns:
        Coverage (the share accepted), risk (the error rate among the accepted) and thresholds, ``(G,)`` each, in
        ascending order.

    Raises:
        ValueError: If there is no sample, or a shape or a value is wrong.

    Example:
        >>> risk_coverage_curve(torch.tensor([-1.0, 5.0, 5.0, 7.0]), torch.tensor([0, 1, 0, 1]))
        (tensor([0.2500, 0.7500, 1.0000]), tensor([0.0000, 0.3333, 0.5000]), tensor([-1.,  5.,  7.]))
    """
    return risk_coverage_curve_of_counts(count(scores, target))


def risk_coverage_curve_of_counts(counts: Counts) -> tuple[Tensor, Tensor, Tensor]:
    """The risk-coverage curve of counts, in float32."""
    if not len(counts.scores):
        raise ValueError(f"the risk-coverage curve needs {SOME}")
    coverage = counts.samples_to / counts.samples_to[-1]
    return coverage.float(), (counts.positives_to / counts.samples_to).float(), counts.scores


def accuracy_at_coverage(scores: Tensor, target: Tensor, coverage: float = 0.9) -> Tensor:
    """The accuracy on the ``ceil(coverage * N)`` lowest scores, in the mean over all orders of ties.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign; infinities rank, NaN is refused.
        target: ``(N,)``, 1 = the prediction is wrong, 0 = it is right.
        coverage: The share of samples that is accepted, in (0, 1].

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
    """Accuracy at a coverage of counts ``(G,)``, in float64; NaN without samples."""
    check_rate(coverage, "coverage")
    size = real(counts.positive + counts.negative)
    wanted = torch.ceil(size.sum() * coverage * (1 - 1e-12))
    accepted = torch.minimum(size, (wanted - (counts.samples_to - size)).clamp(min=0))
    return 1 - (accepted * counts.positive / size.clamp(min=1)).sum() / wanted


def coverage_at_risk(scores: Tensor, target: Tensor, risk: float = 0.05) -> Tensor:
    """The largest share of samples that a threshold accepts at an error rate of at most ``risk``.

    A threshold accepts or rejects tied samples together.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign; infinities rank, NaN is refused.
        target: ``(N,)``, 1 = the prediction is wrong, 0 = it is right.
        risk: The error rate among the accepted that is allowed, in (0, 1].

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
    """Coverage at a risk of counts ``(G,)``, in float64; NaN without samples."""
    check_rate(risk, "risk")
    accepted = counts.samples_to
    good = counts.positives_to <= risk * accepted * (1 + 1e-12)
    return torch.cat([accepted.new_zeros(1), torch.where(good, accepted, 0)]).amax() / (
        counts.positives + counts.negatives
    )
