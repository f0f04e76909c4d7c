"""Counts per distinct score, the input of every ranking metric.

A ranking metric depends only on the order of the scores and their ties. So the scores are sorted once and grouped into
distinct scores in ascending order, with the number of negatives and positives of each. Metrics of counts accept leading
batch dimensions, such as bootstrap resamples, and work on histograms as well as on exact groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_gradmetrics.meters.functional.sorting import positions, sort_with

__all__ = [
    "Counts",
    "Positive",
    "Reads",
    "announce_undefined",
    "check_rate",
    "check_scores",
    "check_target",
    "check_tensor",
    "count",
    "dot",
    "flip",
    "real",
]

Positive = Literal["out", "in"]
"""The positive class: ``"out"`` is target 1 (an error, or out-of-distribution), ``"in"`` is target 0."""

Reads = Literal["all", "positives", "negatives"]
"""The samples whose scores a metric reads; of other samples, it reads how many lie between these scores."""

LEAST_INEXACT = 2**53
"""Smaller integers are exact in float64."""

FEWEST_FOR_KERNEL = 2**16
"""Fewer scores are not worth a compiler, nor the import of the engine."""


@dataclass(frozen=True)
class Sums:
    """Counts at some of the distinct scores, in float64, and the cumulative counts up to and including each of them.

    Args:
        negative: ``(..., M)``, samples with target 0 at each score.
        positive: ``(..., M)``, samples with target 1 at each score.
        negatives_to: ``(..., M)``, negatives at or below each score.
        positives_to: ``(..., M)``, positives at or below each score.
        complete: Whether no score was left out.
        tied: Whether a score may have samples of both classes.
    """

    negative: Tensor
    positive: Tensor
    negatives_to: Tensor
    positives_to: Tensor
    complete: bool = False
    tied: bool = True


@dataclass(frozen=True)
class Counts:
    """Distinct scores in ascending order, and the samples of each class up to each score.

    Args:
        distinct: The distinct scores ``(G,)``, ascending, or a function that returns them.
        negatives_to: ``(..., G)``, the number (or total weight) of samples with target 0 at or below each score.
        positives_to: ``(..., G)``, the number (or total weight) of samples with target 1 at or below each score.
        reads: ``"positives"`` or ``"negatives"`` if only scores with samples of this class are listed; the sums, and the
            totals in ``known``, count the samples at all scores.
        tied: Whether a score may have samples of both classes.
        known: Cached results: the counts at each score, the totals, and metrics that other metrics use.
    """

    distinct: Tensor | Callable[[], Tensor]
    negatives_to: Tensor
    positives_to: Tensor
    reads: Reads = "all"
    tied: bool = True
    known: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, scores: Tensor, negative: Tensor, positive: Tensor) -> Counts:
        """Return counts from the numbers of negatives and positives at each score, ``(..., G)`` each."""
        known = {"negative": negative, "positive": positive}
        return cls(scores, negative.cumsum(-1), positive.cumsum(-1), known=known)

    @cached_property
    def scores(self) -> Tensor:
        """``(G,)``, the distinct scores, ascending."""
        return self.distinct if isinstance(self.distinct, Tensor) else self.distinct()

    @cached_property
    def negative(self) -> Tensor:
        """``(..., G)``, the negatives at each score."""
        return self.known["negative"] if "negative" in self.known else _steps(self.negatives_to)

    @cached_property
    def positive(self) -> Tensor:
        """``(..., G)``, the positives at each score."""
        return self.known["positive"] if "positive" in self.known else _steps(self.positives_to)

    @cached_property
    def samples_to(self) -> Tensor:
        """``(..., G)``, the samples of either class at or below each score, in float64."""
        return real(self.negatives_to) + self.positives_to

    @cached_property
    def negatives_from(self) -> Tensor:
        """``(..., G)``, the negatives at or above each score, in float64."""
        return self.negatives[..., None] - self.negatives_to + self.negative

    @cached_property
    def positives_from(self) -> Tensor:
        """``(..., G)``, the positives at or above each score, in float64."""
        return self.positives[..., None] - self.positives_to + self.positive

    @cached_property
    def negatives(self) -> Tensor:
        """``(...)``, the number of negatives, in float64."""
        return self.known["negatives"] if "negatives" in self.known else _last(self.negatives_to)

    @cached_property
    def positives(self) -> Tensor:
        """``(...)``, the number of positives, in float64."""
        return self.known["positives"] if "positives" in self.known else _last(self.positives_to)

    @cached_property
    def at_positives(self) -> Sums:
        """The sums at the scores of positives; with batch dimensions, maybe at other scores too."""
        if self.positives_to.ndim > 1:
            return self._batch_sums("positives")
        chosen = _steps_up(self.positives_to)
        negatives_to, negative = _steps_at(self.negatives_to, chosen)
        positives_to = real(self.positives_to.index_select(0, chosen))
        return Sums(negative, _steps(positives_to), negatives_to, positives_to)

    @cached_property
    def at_negatives(self) -> Sums:
        """The sums at the scores of negatives; with batch dimensions, maybe at other scores too."""
        if self.negatives_to.ndim > 1:
            return self._batch_sums("negatives")
        chosen = _steps_up(self.negatives_to)
        positives_to, positive = _steps_at(self.positives_to, chosen)
        negatives_to = real(self.negatives_to.index_select(0, chosen))
        return Sums(_steps(negatives_to), positive, negatives_to, positives_to)

    def _batch_sums(self, name: Reads) -> Sums:
        """Return the sums at all listed scores.

        Raises:
            ValueError: If only the scores of the other class are listed.
        """
        if self.reads not in (name, "all"):
            raise ValueError(f"these counts list the scores of {self.reads} only, not those of {name}")
        return Sums(
            real(self.negative),
            real(self.positive),
            real(self.negatives_to),
            real(self.positives_to),
            complete=self.reads == "all",
            tied=self.tied,
        )

    @property
    def pairs(self) -> Tensor:
        """``(...)``, the pairs of a positive and a negative with a lower score, ties by half, in float64."""
        if "pairs" not in self.known:
            sums = self.at_positives
            pairs = dot(sums.positive, sums.negatives_to)
            self.known["pairs"] = pairs - dot(sums.positive, sums.negative) / 2 if sums.tied else pairs
        return self.known["pairs"]

    def negatives_above(self, index: Tensor) -> Tensor:
        """Return the negatives at or above the scores at ``index`` ``(..., I)``, in float64."""
        if "negative" in self.known:
            below = self.negatives_to.gather(-1, index) - self.known["negative"].gather(-1, index)
        else:
            below = self.negatives_to.gather(-1, (index - 1).clamp(min=0)) * (index > 0)
        return self.negatives[..., None] - below


def _steps_up(sums: Tensor) -> Tensor:
    """Return the positions ``(M,)`` at which cumulative sums ``(G,)`` increase, starting from 0."""
    changes = torch.ones(len(sums), dtype=torch.bool, device=sums.device)
    torch.ne(sums[1:], sums[:-1], out=changes[1:])
    changes[:1] = sums[:1] != 0
    return positions(changes)


def _steps_at(sums: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cumulative sums at the chosen positions ``(M,)``, and the increase of each over the one before."""
    here = real(sums.index_select(0, chosen))
    before = real(sums.index_select(0, (chosen - 1).clamp_(min=0)))
    before[:1] *= chosen[:1] != 0
    return here, here - before


def _steps(sums: Tensor) -> Tensor:
    """Return the differences of cumulative sums ``(..., G)``, starting from 0."""
    steps = sums.clone()
    steps[..., 1:] -= sums[..., :-1]
    return steps


def _last(sums: Tensor) -> Tensor:
    return real(sums[..., -1] if sums.shape[-1] else sums.sum(-1))


def check_tensor(values: Any, name: str) -> None:
    """Check that an argument is a tensor.

    Raises:
        TypeError: If it is not a tensor; the message states how to convert it.
    """
    if isinstance(values, Tensor):
        return
    kind = type(values)
    remedy = f"torch.from_numpy({name})" if isinstance(values, np.ndarray) else f"torch.as_tensor({name})"
    raise TypeError(f"{name} must be a torch.Tensor, got {kind.__module__}.{kind.__name__}: use {remedy}")


def check_scores(scores: Tensor, name: str = "scores") -> Tensor:
    """Return scores as a floating ``(N,)`` tensor that can be ranked.

    Infinities rank above or below everything else; NaN has no rank and is refused.

    Args:
        scores: ``(N,)``, any real type.
        name: The name of the scores in error messages.

    Returns:
        ``(N,)`` in float32 or float64 (half precision becomes float32, integers float64), detached.

    Raises:
        TypeError: If it is not a tensor of real numbers.
        ValueError: If it is not one-dimensional, contains NaN, or contains integers that float64 would round.
    """
    check_tensor(scores, name)
    if scores.is_complex() or scores.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of real numbers, got {scores.dtype}")
    if scores.ndim != 1:
        raise ValueError(f"{name} must have the shape (N,), one score per sample, got {tuple(scores.shape)}")
    scores = scores.detach()
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.to(torch.float32) if scores.is_floating_point() else _whole_numbers(scores, name)
    # The maximum is NaN if any value is NaN, and is five times faster than isnan().
    if len(scores) and bool(torch.isnan(scores.max())):
        number = int(torch.isnan(scores).sum())
        raise ValueError(
            f"{name} has {number} NaN among {len(scores)} values, and a NaN has no rank: drop these samples and report "
            "their number"
        )
    return scores


def _whole_numbers(scores: Tensor, name: str) -> Tensor:
    """Return integers ``(N,)`` in float64, if it holds all of them exactly."""
    exact = scores.double()
    if len(exact) and bool(exact.abs().max() >= LEAST_INEXACT):
        raise ValueError(
            f"{name} has integers of 2^53 or more in magnitude, which float64 would round: subtract a constant from "
            "all of them, or replace each by its rank, as by scores.unique(return_inverse=True)[1]"
        )
    return exact


def check_target(target: Tensor, scores: Tensor) -> Tensor:
    """Return targets as a bool ``(N,)`` tensor.

    Args:
        target: ``(N,)`` of 0 and 1, of any type.
        scores: ``(N,)``.

    Raises:
        TypeError: If it is not a tensor.
        ValueError: If the shape or device differs from the scores', or a value is neither 0 nor 1.
    """
    check_tensor(target, "target")
    if target.shape != scores.shape:
        raise ValueError(f"target must have the shape of scores, {tuple(scores.shape)}, got {tuple(target.shape)}")
    if target.device != scores.device:
        raise ValueError(f"target is on {target.device} and scores on {scores.device}: move one of them")
    if target.dtype == torch.bool:
        return target.detach()
    if not _is_binary(target):
        raise ValueError(
            "target must be 0 or 1 everywhere: 1 is an error or an out-of-distribution sample, 0 is any other sample"
        )
    return target.detach().bool()


def _is_binary(target: Tensor) -> bool:
    if not len(target):
        return True
    if not target.is_floating_point() and not target.is_complex():
        least, largest = target.aminmax()
        return bool(least >= 0) and bool(largest <= 1)
    return bool(((target == 0) | (target == 1)).all())


def check_rate(value: float, name: str) -> float:
    """Return a number in (0, 1], checked.

    Raises:
        ValueError: If the number is not in (0, 1].
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a number above 0 and at most 1, got {value!r}")
    return float(value)


def count(scores: Tensor, target: Tensor) -> Counts:
    """Group samples by score.

    Args:
        scores: ``(N,)``, raw, any scale and sign.
        target: ``(N,)`` of 0 and 1.

    Returns:
        The counts of each distinct score.

    Raises:
        TypeError: If an argument is not a tensor of numbers.
        ValueError: If a shape or a value is wrong, or a score is NaN.

    Example:
        >>> counts = count(torch.tensor([2.0, -1.0, 2.0]), torch.tensor([1, 0, 0]))
        >>> counts.scores.tolist(), counts.negative.tolist(), counts.positive.tolist()
        ([-1.0, 2.0], [1, 1], [0, 1])
    """
    scores = check_scores(scores)
    target = check_target(target, scores)
    if len(scores) >= FEWEST_FOR_KERNEL:
        from lightning_gradmetrics.engine.kernels.sorting import sorted_counts

        found = sorted_counts(scores, target)
        if found is not None:
            pairs = torch.tensor(found.pairs, dtype=torch.float64)
            return Counts(found.distinct, found.negatives_to, found.positives_to, known={"pairs": pairs})
    ranked = sort_with(scores, target.view(torch.uint8))
    positives_to = ranked.sums_to(ranked.numbers)
    negatives_to = ranked.ends.to(positives_to.dtype).add(1).sub_(positives_to)
    return Counts(ranked.distinct, negatives_to, positives_to)


def real(number: Tensor) -> Tensor:
    """Return counts in float64."""
    return number.double()


def dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum ``(...)`` over the last dimension of the product of two tensors ``(..., G)``."""
    product: Tensor = torch.linalg.vecdot(one, other)
    return product


def flip(counts: Counts) -> Counts:
    """Return the counts of negated scores with the classes exchanged, so that target 0 is the positive class.

    Raises:
        ValueError: If only the scores of one class are listed.
    """
    if counts.reads != "all":
        raise ValueError(f"these counts list the scores of {counts.reads} only, and flipped counts need all scores")
    return Counts.of(-counts.scores.flip(-1), counts.positive.flip(-1), counts.negative.flip(-1))


def announce_undefined(value: Tensor, metric: str, needs: str) -> Tensor:
    """Return a metric's value in float32, and warn once if it is NaN.

    Args:
        value: A scalar.
        metric: The metric's name, for the message.
        needs: The samples that the metric needs, for the message.
    """
    if bool(torch.isnan(value).any()):
        from torchmetrics.utilities.prints import rank_zero_warn  # its import takes a second

        rank_zero_warn(f"{metric} is undefined and returned as NaN: it needs {needs}", UserWarning, stacklevel=4)
    return value.to(torch.float32)
