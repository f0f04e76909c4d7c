"""What the columns of the main table are, which way is better in each, and how its figures are written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lightning_gradmetrics.report.run import Metric, Run

__all__ = [
    "METRIC_KINDS",
    "ROLES",
    "Column",
    "MetricKind",
    "best_values",
    "column_of",
    "find_columns",
    "ordered_scores",
    "percent",
]

ROLES = {"id": "in-distribution", "near": "near out-of-distribution", "far": "far out-of-distribution"}
SHOWN = {"misclassification": ("auroc", "aurc"), "ood": ("auroc", "fpr95")}


@dataclass(frozen=True)
class MetricKind:
    """How a metric is called, whether higher is better (None: unknown), its decimals, and what it means."""

    title: str
    higher: bool | None = None
    digits: int = 1
    meaning: str = ""

    @property
    def arrow(self) -> str:
        """An arrow in the better direction, or nothing where it is unknown."""
        return {True: "↑", False: "↓", None: ""}[self.higher]


METRIC_KINDS = {
    "auroc": MetricKind(
        "AUROC", True, 1, "chance that a random positive scores above a random negative; 50 is guessing"
    ),
    "aupr": MetricKind("AP", True, 1, "average precision, the area under the precision-recall curve"),
    "aupr_in": MetricKind("AP in", True, 1, "average precision with the negatives taken as positives"),
    "fpr95": MetricKind("FPR95", False, 1, "share of negatives flagged when 95 % of positives are flagged"),
    "aurc": MetricKind(
        "AURC", False, 2, "mean error rate over all shares of rows kept, the least uncertain kept first"
    ),
    "e_aurc": MetricKind("E-AURC", False, 2, "AURC minus that of a perfect ordering"),
    "augrc": MetricKind("AUGRC", False, 2, "AURC with errors counted against all rows, not only the rows kept"),
    "auac": MetricKind("AUAC", True, 1, "area under the accuracy curve"),
    "aufc": MetricKind("AUFC", True, 1, "area under the F1 curve"),
}


@dataclass(frozen=True)
class Column:
    """One metric of one task on one data set, or on a group of them."""

    task: str
    place: str
    metric: str
    grouped: bool = False

    @property
    def kind(self) -> MetricKind:
        """The metric's kind; an unknown metric keeps its own name and has no direction."""
        return METRIC_KINDS.get(self.metric, MetricKind(self.metric))

    @property
    def title(self) -> str:
        """In words, as in 'out-of-distribution AUROC on photos'."""
        task = {"ood": "out-of-distribution"}.get(self.task, self.task)
        return f"{task} {self.kind.title} on {'group ' if self.grouped else ''}{self.place}"


def column_of(run: Run, entry: Metric) -> Column:
    """The column that a figure belongs to."""
    known = {dataset.name for dataset in run.datasets}
    grouped = entry.group is not None and (entry.dataset is None or entry.dataset not in known)
    return Column(entry.task, str(entry.group if grouped else entry.dataset or ""), entry.metric, grouped)


def find_columns(run: Run) -> dict[Column, dict[str, Metric]]:
    """Columns of the main table in reading order, each with its figure by score.

    Misclassification comes first, then each out-of-distribution set, then groups of two sets or more. Shown are AUROC and
    AURC, or AUROC and FPR95; where a place has neither, all that it has.
    """
    found: dict[Column, dict[str, Metric]] = {}
    for entry in run.metrics:
        found.setdefault(column_of(run, entry), {})[entry.score] = entry
    order = [dataset.name for dataset in run.datasets]
    tasks = [*SHOWN, *sorted({column.task for column in found} - set(SHOWN))]
    kept = [column for column in found if _is_shown(column, found) and not _repeats_its_only_set(run, column)]
    return {column: found[column] for column in sorted(kept, key=lambda column: _position(column, order, tasks))}


def _is_shown(column: Column, found: Iterable[Column]) -> bool:
    shown = SHOWN.get(column.task, ())
    beside = {other.metric for other in found if (other.task, other.place) == (column.task, column.place)}
    return column.metric in shown or not beside & set(shown)


def _repeats_its_only_set(run: Run, column: Column) -> bool:
    members = sum(dataset.role == column.place for dataset in run.datasets)
    return column.grouped and members == 1


def _position(column: Column, order: list[str], tasks: list[str]) -> tuple[int, bool, int, int]:
    shown = SHOWN.get(column.task, ())
    place = order.index(column.place) if column.place in order else len(order)
    return (
        tasks.index(column.task),
        column.grouped,
        place,
        shown.index(column.metric) if column.metric in shown else len(shown),
    )


def ordered_scores(run: Run) -> list[str]:
    """Names of the scores, baselines first, each family in the run's own order."""
    return [score.name for score in sorted(run.scores, key=lambda score: score.family != "baseline")]


def percent(value: float | None, digits: int) -> str:
    """A figure times 100, with a true minus sign; a dash where there is none.

    Example:
        >>> percent(0.91234, 1), percent(None, 1), percent(-0.005, 2)
        ('91.2', '–', '−0.50')
    """
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def best_values(column: Column, entries: dict[str, Metric]) -> list[str]:
    """The scores that are best in a column as far as its decimals show; none where the direction is unknown."""
    kind = column.kind
    rounded = {
        name: round(100 * entry.value, kind.digits)
        for name, entry in entries.items()
        if entry.value is not None and math.isfinite(entry.value)
    }
    if kind.higher is None or not rounded:
        return []
    best = (max if kind.higher else min)(rounded.values())
    return [name for name, value in rounded.items() if value == best]
