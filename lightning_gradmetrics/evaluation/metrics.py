"""The metrics of each task, with their names, directions and functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_gradmetrics.meters.functional.counts import Counts, Reads
from lightning_gradmetrics.meters.functional.ranking import (
    auroc_of_counts,
    average_precision_of_counts,
    fpr_at_tpr_of_counts,
)
from lightning_gradmetrics.meters.functional.selective import augrc_of_counts, aurc_of_counts, e_aurc_of_counts

if TYPE_CHECKING:
    from lightning_gradmetrics.meters.base import ScoreMeter

__all__ = ["HIGHER_IS_BETTER", "METRICS", "SHOWN", "TASKS", "Metric", "metrics_of", "register_metric"]

MISCLASSIFICATION, OOD, JOINT = "misclassification", "ood", "joint"
TASK_NAMES = (JOINT, MISCLASSIFICATION, OOD)


@dataclass(frozen=True)
class Metric:
    """A metric of the protocol; :func:`register_metric` describes its fields.

    Example:
        >>> METRICS["fpr95"].higher_is_better, METRICS["fpr95"].title
        (False, 'FPR95')
    """

    name: str
    title: str
    meaning: str
    higher_is_better: bool
    of_counts: Callable[[Counts, float], Tensor]
    tasks: tuple[str, ...]
    shown: tuple[str, ...] = ()
    digits: int = 1
    reads: Reads = "all"
    totals: bool = False
    """Whether ``of_counts`` needs only the totals that :mod:`lightning_gradmetrics.evaluation.totals` computes."""


METRICS: dict[str, Metric] = {}
"""Every metric by its name."""

TASKS: dict[str, tuple[str, ...]] = dict.fromkeys(TASK_NAMES, ())
"""The names of each task's metrics."""

SHOWN: dict[str, tuple[str, ...]] = dict.fromkeys(TASK_NAMES, ())
"""The names of the metrics that the main table shows for each task."""

HIGHER_IS_BETTER: dict[str, bool] = {}
"""Whether a larger value of each metric is better. ``fpr95`` is the false-positive rate at ``rate``, by default 0.95."""


def register_metric(
    name: str,
    title: str,
    meaning: str,
    meter: type[ScoreMeter],
    of_counts: Callable[[Counts, float], Tensor],
    *,
    tasks: Sequence[str],
    shown: Sequence[str] = (),
    digits: int = 1,
    reads: Reads = "all",
) -> None:
    """Add a metric to the evaluation of every run.

    Args:
        name: Its name in tables and files, such as ``"auroc"``.
        title: Its name for readers, such as ``"AUROC"``.
        meaning: One line that explains it.
        meter: The meter of the same metric; its ``higher_is_better`` is the direction.
        of_counts: Computes the metric from :class:`~lightning_gradmetrics.meters.functional.counts.Counts` with leading
            dimensions ``(...)`` and the true-positive rate of ``fpr95``; returns ``(...)``, NaN where undefined.
        tasks: The tasks that it is computed for: any of ``"joint"``, ``"misclassification"`` and ``"ood"``.
        shown: The tasks whose main table shows it.
        digits: The number of decimals of the value times 100.
        reads: ``"positives"`` if the metric depends only on the counts at the scores of positives and on both totals, so
            that the bootstrap may leave out other scores; ``"negatives"`` likewise; by default, no score is left out.

    Returns:
        None.

    Raises:
        ValueError: If the name is taken, a task is unknown, or the meter has no direction.

    Example:
        >>> from lightning_gradmetrics import meters
        >>> register_metric("auroc", "AUROC", "", meters.AUROC, auroc_of_counts, tasks=["ood"])
        Traceback (most recent call last):
        ValueError: the metric name 'auroc' is taken: choose another name
    """
    if name in METRICS:
        raise ValueError(f"the metric name {name!r} is taken: choose another name")
    if not tasks or set(tasks) - set(TASKS):
        raise ValueError(f"the tasks of {name!r} must be among {', '.join(TASKS)}, got {tasks}")
    if set(shown) - set(tasks):
        raise ValueError(f"the metric {name!r} is shown for {shown}, but computed only for {tasks}")
    if meter.higher_is_better is None:
        raise ValueError(f"{meter.__name__}.higher_is_better is None: a metric of the protocol has a direction")
    is_better = bool(meter.higher_is_better)
    _register(Metric(name, title, meaning, is_better, of_counts, tuple(tasks), tuple(shown), digits, reads))


def _register(metric: Metric) -> None:
    METRICS[metric.name] = metric
    HIGHER_IS_BETTER[metric.name] = metric.higher_is_better
    for task in metric.tasks:
        TASKS[task] += (metric.name,)
    for task in metric.shown:
        SHOWN[task] += (metric.name,)


def metrics_of(names: Iterable[str], counts: Counts, rate: float) -> dict[str, Tensor]:
    """Compute metrics of a task.

    Args:
        names: The names of the metrics.
        counts: Counts with any leading dimensions ``(...)``.
        rate: The true-positive rate of ``fpr95``; the positives are the errors or the out-of-distribution samples.

    Returns:
        Each metric, ``(...)``; NaN where it is undefined.
    """
    values = {}
    for name in names:
        values[name] = METRICS[name].of_counts(counts, rate)
    return values


def _auroc(counts: Counts, rate: float) -> Tensor:
    return auroc_of_counts(counts)


def _fpr(counts: Counts, rate: float) -> Tensor:
    return fpr_at_tpr_of_counts(counts, rate)


def _aurc(counts: Counts, rate: float) -> Tensor:
    return aurc_of_counts(counts)


def _e_aurc(counts: Counts, rate: float) -> Tensor:
    return e_aurc_of_counts(counts)


def _augrc(counts: Counts, rate: float) -> Tensor:
    return augrc_of_counts(counts)


def _aupr(counts: Counts, rate: float) -> Tensor:
    return average_precision_of_counts(counts)


def _aupr_in(counts: Counts, rate: float) -> Tensor:
    return average_precision_of_counts(counts, "in")


ALL = (MISCLASSIFICATION, OOD, JOINT)
SELECTIVE = (MISCLASSIFICATION, JOINT)

_register(
    Metric(
        "auroc",
        "AUROC",
        "probability that a random positive scores above a random negative; 50 is guessing",
        higher_is_better=True,
        of_counts=_auroc,
        tasks=ALL,
        shown=ALL,
        reads="positives",
        totals=True,
    )
)
_register(
    Metric(
        "aurc",
        "AURC",
        "error rate among the retained samples, averaged over all coverages",
        higher_is_better=False,
        of_counts=_aurc,
        tasks=SELECTIVE,
        shown=SELECTIVE,
        digits=2,
        reads="positives",
        totals=True,
    )
)
_register(
    Metric(
        "e_aurc",
        "E-AURC",
        "AURC minus the AURC of a perfect ranking",
        higher_is_better=False,
        of_counts=_e_aurc,
        tasks=(MISCLASSIFICATION,),
        digits=2,
        reads="positives",
        totals=True,
    )
)
_register(
    Metric(
        "augrc",
        "AUGRC",
        "fraction of all samples that are undetected errors, averaged over all coverages",
        higher_is_better=False,
        of_counts=_augrc,
        tasks=SELECTIVE,
        digits=2,
        reads="positives",
        totals=True,
    )
)
_register(
    Metric(
        "fpr95",
        "FPR95",
        "fraction of negatives flagged at a threshold that flags 95 % of the positives",
        higher_is_better=False,
        of_counts=_fpr,
        tasks=ALL,
        shown=(OOD,),
        reads="positives",
        totals=True,
    )
)
_register(
    Metric(
        "aupr",
        "AUPR",
        "area under the precision-recall curve",
        higher_is_better=True,
        of_counts=_aupr,
        tasks=(MISCLASSIFICATION, OOD),
        reads="positives",
        totals=True,
    )
)
_register(
    Metric(
        "aupr_in",
        "AUPR in",
        "area under the precision-recall curve with in-distribution samples as positives",
        higher_is_better=True,
        of_counts=_aupr_in,
        tasks=(OOD,),
        reads="negatives",
        totals=True,
    )
)
