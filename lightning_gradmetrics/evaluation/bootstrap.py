"""Bootstrap: every metric on resampled rows, all scores on the same resamples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_gradmetrics.evaluation.metrics import metrics_of
from lightning_gradmetrics.evaluation.tasks import DetectionTask, Rows
from lightning_gradmetrics.meters.functional.counts import Counts

__all__ = ["Key", "Replicates", "interval", "replicate"]

Key = tuple[str, str | None, str, str, str]
"""Task, data set (``None`` for the mean over a group), group, score, metric."""

Replicates = dict[Key, Tensor]
"""A metric's value in each resample, ``(B,)``."""

ELEMENTS = 2**18


def replicate(
    rows: Mapping[str, Rows],
    tasks: Sequence[DetectionTask],
    scores: Sequence[str],
    rate: float,
    resamples: int,
    seed: int,
    progress: Callable[[float], None] | None = None,
) -> Replicates:
    """Metrics of ``B`` resamples.

    Each data set is resampled by itself, with replacement and to its own size. All scores and all tasks see the
    same resamples, so that differences between scores, and means over data sets, are paired.

    Args:
        rows: The rows of each data set.
        tasks: What is judged.
        scores: The scores that are judged.
        rate: The true-positive rate of ``fpr95``.
        resamples: ``B``.
        seed: The seed of the resamples; the global random state is neither used nor changed.
        progress: Called with the share that is done.
    """
    rankings = [{score: _Ranking(task.values(rows, score), task.target) for score in scores} for task in tasks]
    pieces: dict[Key, list[Tensor]] = {}
    for done, weights in _blocks({name: len(part) for name, part in rows.items()}, resamples, seed):
        for task, ranking in zip(tasks, rankings, strict=True):
            drawn = task.weights(weights)
            for score in scores:
                for metric, value in metrics_of(task.task, ranking[score].counts(drawn), rate).items():
                    key = (task.task, task.dataset, task.group, score, metric)
                    pieces.setdefault(key, []).append(value.double())
        if progress is not None:
            progress(done / resamples)
    return {key: torch.cat(values) for key, values in pieces.items()}


def _blocks(sizes: Mapping[str, int], resamples: int, seed: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Blocks of resamples that fit the cache: how many are done, and the weights ``(b, n)`` of each data set."""
    generators = {name: torch.Generator().manual_seed(_mixed(seed, place)) for place, name in enumerate(sizes)}
    block = max(1, min(resamples, ELEMENTS // max(1, sum(sizes.values()))))
    for start in range(0, resamples, block):
        number = min(block, resamples - start)
        yield start + number, {name: _weights(size, number, generators[name]) for name, size in sizes.items()}


def _mixed(seed: int, place: int) -> int:
    return (seed * 1_000_003 + place * 7_919 + 12_345) % 2**63


def _weights(size: int, number: int, generator: torch.Generator) -> Tensor:
    """How often each of ``size`` rows is drawn, ``(number, size)`` in float32; whole numbers, exact up to 2^24 rows."""
    if not size:
        return torch.zeros(number, 0)
    drawn = torch.randint(size, (number, size), generator=generator)
    drawn += torch.arange(number)[:, None] * size
    return torch.bincount(drawn.view(-1), minlength=number * size).view(number, size).float()


class _Ranking:
    """One score on one task, sorted once for all resamples."""

    def __init__(self, values: Tensor, target: Tensor) -> None:
        self.distinct, group = torch.unique(values, return_inverse=True)
        self.order = torch.argsort(group, stable=True)
        self.ends = torch.bincount(group, minlength=len(self.distinct)).cumsum(0) - 1
        self.positive = target[self.order].float()

    def counts(self, weights: Tensor) -> Counts:
        """Counts of weighted rows ``(b, n)``: ``(b, G)``."""
        weights = weights[:, self.order]
        positive = weights * self.positive
        negative = weights - positive
        return Counts.of(self.distinct, self._grouped(negative), self._grouped(positive))

    def _grouped(self, weights: Tensor) -> Tensor:
        if len(self.ends) == weights.shape[1]:
            return weights
        # Sums in float64: differences of float32 sums would not be whole numbers for long rows.
        sums = weights.double().cumsum(1)[:, self.ends]
        return torch.diff(sums, dim=1, prepend=sums.new_zeros(len(sums), 1)).float()


def interval(values: Tensor, level: float) -> tuple[float | None, float | None]:
    """The percentile interval of replicates ``(B,)``; ``None`` where fewer than half of them are defined.

    Example:
        >>> interval(torch.arange(101.0), 0.5)
        (25.0, 75.0)
    """
    defined = values[~torch.isnan(values)]
    if 2 * len(defined) < len(values) or not len(defined):
        return None, None
    low, high = torch.quantile(defined.double(), torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return float(low), float(high)
