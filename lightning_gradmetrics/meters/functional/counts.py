"""Counts per distinct score: the one thing that every ranking metric is a function of.

A metric of a ranking needs the scores only through their order and their ties. So scores are first grouped: the
distinct scores in ascending order, and how many negatives and positives each has. Metrics of counts take leading
batch dimensions, which serves the bootstrap (one row a resample), and take a histogram as well as exact groups, which
serves constant memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torchmetrics.utilities.prints import rank_zero_warn

__all__ = [
    "Counts",
    "Positive",
    "announce_undefined",
    "check_rate",
    "check_scores",
    "check_target",
    "count",
    "flip",
    "real",
]

Positive = Literal["out", "in"]
"""Which class is the positive one: ``"out"`` is target 1 (an error, or out-of-distribution), ``"in"`` is target 0."""


@dataclass(frozen=True)
class Counts:
    """Distinct scores in ascending order, and the samples of each class that have them.

    Args:
        scores: ``(G,)``, ascending and distinct.
        negative: ``(..., G)``, the number of samples with target 0.
        positive: ``(..., G)``, the number of samples with target 1.
    """

    scores: Tensor
    negative: Tensor
    positive: Tensor

    @cached_property
    def negatives_to(self) -> Tensor:
        """``(..., G)``, the negatives at or below each score."""
        return real(self.negative).cumsum(-1)

    @cached_property
    def positives_to(self) -> Tensor:
        """``(..., G)``, the positives at or below each score."""
        return real(self.positive).cumsum(-1)

    @cached_property
    def samples_to(self) -> Tensor:
        """``(..., G)``, the samples of either class at or below each score."""
        return self.negatives_to + self.positives_to

    @cached_property
    def negatives_from(self) -> Tensor:
        """``(..., G)``, the negatives at or above each score."""
        return self.negatives_to[..., -1:] - self.negatives_to + self.negative

    @cached_property
    def positives_from(self) -> Tensor:
        """``(..., G)``, the positives at or above each score."""
        return self.positives_to[..., -1:] - self.positives_to + self.positive

    @cached_property
    def negatives(self) -> Tensor:
        """``(...)``, the number of negatives."""
        return real(self.negative).sum(-1)

    @cached_property
    def positives(self) -> Tensor:
        """``(...)``, the number of positives."""
        return real(self.positive).sum(-1)


def check_scores(scores: Tensor, name: str = "scores") -> Tensor:
    """Scores as a floating ``(N,)`` tensor that can be ranked.

    Plus and minus infinity rank above and below everything else; NaN has no rank and is refused.

    Args:
        scores: ``(N,)``, any real type.
        name: What to call them in a message.

    Returns:
        ``(N,)`` in float32 or float64 (half precision becomes float32, integers float64), detached.

    Raises:
        TypeError: If it is no tensor of real numbers.
        ValueError: If it is not one-dimensional, or has a NaN.
    """
    if not isinstance(scores, Tensor) or scores.is_complex() or scores.dtype == torch.bool:
        raise TypeError(
            f"{name} must be a tensor of real numbers, got {getattr(scores, 'dtype', type(scores).__name__)}"
        )
    if scores.ndim != 1:
        raise ValueError(f"{name} must have the shape (N,), one score a sample, got {tuple(scores.shape)}")
    scores = scores.detach()
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.to(torch.float32 if scores.is_floating_point() else torch.float64)
    if bool(torch.isnan(scores).any()):
        found = int(torch.isnan(scores).sum())
        raise ValueError(
            f"{name} has {found} NaN of {len(scores)}: a NaN has no rank; leave these samples out and count them"
        )
    return scores


def check_target(target: Tensor, scores: Tensor) -> Tensor:
    """Targets as a bool ``(N,)`` tensor beside their scores.

    Args:
        target: ``(N,)`` of 0 and 1, of any type.
        scores: ``(N,)``.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If the shape or device differs from the scores', or a value is neither 0 nor 1.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor of 0 and 1, got {type(target).__name__}")
    if target.shape != scores.shape:
        raise ValueError(f"target must have the shape of scores, {tuple(scores.shape)}, got {tuple(target.shape)}")
    if target.device != scores.device:
        raise ValueError(f"target is on {target.device} and scores on {scores.device}: move one of them")
    if target.dtype == torch.bool:
        return target.detach()
    positive = target == 1
    if not bool((positive | (target == 0)).all()):
        raise ValueError(
            "target must be 0 or 1 everywhere: 1 is an error or an out-of-distribution sample, 0 is any other sample"
        )
    return positive.detach()


def check_rate(value: float, name: str) -> float:
    """A number in (0, 1].

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a number above 0 and at most 1, got {value!r}")
    return float(value)


def count(scores: Tensor, target: Tensor) -> Counts:
    """Group samples by score.

    Args:
        scores: ``(N,)``, raw, any scale and sign.
        target: ``(N,)`` of 0 and 1.

    Example:
        >>> counts = count(torch.tensor([2.0, -1.0, 2.0]), torch.tensor([1, 0, 0]))
        >>> counts.scores.tolist(), counts.negative.tolist(), counts.positive.tolist()
        ([-1.0, 2.0], [1, 1], [0, 1])
    """
    scores = check_scores(scores)
    target = check_target(target, scores)
    distinct, group = torch.unique(scores, return_inverse=True)
    table = torch.bincount(group + len(distinct) * target, minlength=2 * len(distinct)).view(2, -1)
    return Counts(distinct, table[0], table[1])


def real(number: Tensor) -> Tensor:
    """Counts as floating numbers: whole numbers in float64, and the weights of resamples as they are."""
    return number if number.is_floating_point() else number.double()


def flip(counts: Counts) -> Counts:
    """The counts of negated scores with the classes exchanged: what makes target 0 the positive class."""
    return Counts(-counts.scores.flip(-1), counts.positive.flip(-1), counts.negative.flip(-1))


def announce_undefined(value: Tensor, metric: str, needs: str) -> Tensor:
    """Pass a metric's value on in float32, with one UserWarning if it is NaN.

    Args:
        value: A scalar.
        metric: The metric's name, for the message.
        needs: What the metric needs that was not there.
    """
    if bool(torch.isnan(value).any()):
        rank_zero_warn(f"{metric} is undefined and returned as NaN: it needs {needs}", UserWarning, stacklevel=4)
    return value.to(torch.float32)
