"""The main table and the table of paired differences: one column per task, dataset and metric, one row per score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_gradmetrics.report.answers import Difference
from lightning_gradmetrics.report.questions import TASK_ORDER, Place, place_of
from lightning_gradmetrics.report.run import Metric, Run, Score
from lightning_gradmetrics.report.wording import (
    SHOWN,
    MetricWords,
    interval,
    metric_words,
    number,
    percent,
    role_title,
    signed,
)

__all__ = ["Cell", "Column", "Table", "all_metrics", "main_table", "marks", "paired_table", "rank_of"]


@dataclass(frozen=True)
class Column:
    """One metric of one task on one dataset or group."""

    place: Place
    metric: str

    @property
    def words(self) -> MetricWords:
        """The wording of the metric."""
        return metric_words(self.metric)

    @property
    def heading(self) -> str:
        """The heading over the metrics of a dataset or group, such as 'near OOD: digits_8_9'."""
        task, dataset, group = self.place
        question = "errors" if task == "misclassification" else role_title(group)
        question = f"errors and {question}" if task == "joint" else question
        return f"{question}: {dataset or f'mean over {group}'}"


@dataclass(frozen=True)
class Cell:
    """A number as text, its interval or verdict, its value for sorting, and whether it is the best of its column."""

    text: str
    detail: str = ""
    sort: float | None = None
    best: bool = False
    verdict: str = ""


@dataclass
class Table:
    """Columns grouped under headings, the cells of each score, and the baseline of each column if there is one.

    ``twins`` names, for a score, an earlier row with the same values in all columns: both rank the samples alike.
    """

    headings: list[tuple[str, int]] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    rows: dict[str, list[Cell]] = field(default_factory=dict)
    baselines: list[str] = field(default_factory=list)
    twins: dict[str, str] = field(default_factory=dict)


def marks(score: Score) -> list[str]:
    """Return the marks of a score: its family, the data it was fitted on, and its cost if it takes more than one pass."""
    fit = "" if score.fit == "none" else score.fit
    passes = "" if score.forwards == 1 else f"{score.forwards or 'unknown'} forwards"
    return list(filter(None, (score.family, fit, passes)))


def main_table(run: Run) -> Table:
    """Return the metrics of every score, sorted by the first column with the best score first."""
    by_column: dict[Column, dict[str, Metric]] = {}
    for metric in run.metrics:
        if metric.score in run.detectors:
            by_column.setdefault(Column(place_of(run, metric), metric.metric), {})[metric.score] = metric
    columns = _ordered(run, list(by_column))
    best = {column: _best(column, by_column[column]) for column in columns}
    table = Table(_headings(columns), columns)
    for score in run.detectors:
        row = []
        for column in columns:
            row.append(_cell(column, by_column[column].get(score), score in best[column]))
        table.rows[score] = row
    if columns:
        table.rows = dict(sorted(table.rows.items(), key=lambda item: rank_of(columns[0], item[1][0])))
    table.twins = _twins(table.rows)
    return table


def _twins(rows: Mapping[str, Sequence[Cell]]) -> dict[str, str]:
    """Return, for each score that equals an earlier row in every column (three or more), the name of that row."""
    first: dict[tuple[float, ...], str] = {}
    twins = {}
    for score, cells in rows.items():
        known = [cell.sort for cell in cells if cell.sort is not None]
        values = tuple(round(value, 9) for value in known)
        earlier = first.setdefault(values, score)
        if earlier != score and len(values) == len(cells) > 2:
            twins[score] = earlier
    return twins


def paired_table(run: Run) -> Table:
    """Return the difference of every score to the baseline, with its verdict."""
    by_column: dict[Column, dict[str, list[Difference]]] = {}
    for entry in run.comparisons:
        task_and_dataset = place_of(
            run, Metric(entry.score, entry.task, entry.metric, None, entry.dataset, entry.group)
        )
        by_score = by_column.setdefault(Column(task_and_dataset, entry.metric), {})
        by_score.setdefault(entry.score, []).append(
            Difference(entry.baseline, entry.difference, entry.low, entry.high, entry.verdict)
        )
    columns = _ordered(run, list(by_column))
    compared = set().union(*(by_column[column] for column in columns))
    table = Table(_headings(columns), columns)
    table.baselines = [_sole_baseline(by_column[column]) for column in columns]
    for score in run.scores:
        row = []
        for column, baseline in zip(columns, table.baselines, strict=True):
            row.append(_paired_cell(column, by_column[column].get(score.name, []), baseline))
        if score.name in compared:
            table.rows[score.name] = row
    return table


def _sole_baseline(by_score: Mapping[str, list[Difference]]) -> str:
    """Return the baseline that all scores are compared with; empty if they differ."""
    names: set[str] = set()
    for differences in by_score.values():
        for difference in differences:
            names.add(difference.baseline)
    return names.pop() if len(names) == 1 else ""


def all_metrics(run: Run) -> list[tuple[str, str, str, str]]:
    """Return score, description, value and interval of every number of the run."""
    rows = []
    for metric in run.metrics:
        column = Column(place_of(run, metric), metric.metric)
        words = column.words
        name = f"{words.title}, {column.heading}"
        rows.append((metric.score, name, percent(metric.value, 2), interval(metric.low, metric.high, 2)))
    return rows


def _ordered(run: Run, columns: Sequence[Column]) -> list[Column]:
    """Return the columns of the table: errors, each dataset, then groups of several datasets."""
    shown = [column for column in columns if _is_shown(run, column, columns)]
    return sorted(shown, key=lambda column: _position(run, column))


def _is_shown(run: Run, column: Column, columns: Sequence[Column]) -> bool:
    task, dataset, group = column.place
    if dataset is None and list(run.roles.values()).count(group) == 1:
        return False
    main = SHOWN.get(task, ())
    has_main = any(shown.place == column.place and shown.metric in main for shown in columns)
    return column.metric in main or not has_main


def _position(run: Run, column: Column) -> tuple[int, bool, int, int]:
    task, dataset, _ = column.place
    names, main = list(run.roles), SHOWN.get(task, ())
    order = TASK_ORDER.index(task) if task in TASK_ORDER else len(TASK_ORDER)
    position = names.index(dataset) if dataset in names else len(names)
    return order, dataset is None, position, main.index(column.metric) if column.metric in main else len(main)


def _headings(columns: Sequence[Column]) -> list[tuple[str, int]]:
    headings: dict[str, int] = {}
    for column in columns:
        headings[column.heading] = headings.get(column.heading, 0) + 1
    return list(headings.items())


def _best(column: Column, metrics: Mapping[str, Metric]) -> set[str]:
    """Return the scores that are best at the shown precision; none if there is one score or the direction is unknown."""
    digits, higher = column.words.digits, column.words.higher
    rounded = {}
    for name, metric in metrics.items():
        if number(metric.value):
            rounded[name] = round(100 * (metric.value or 0.0), digits)
    if higher is None or len(rounded) < 2:
        return set()
    best = max(rounded.values()) if higher else min(rounded.values())
    return set(filter(lambda name: rounded[name] == best, rounded))


def _cell(column: Column, metric: Metric | None, best: bool) -> Cell:
    if metric is None or not number(metric.value):
        return Cell("–")
    digits = column.words.digits
    return Cell(percent(metric.value, digits), interval(metric.low, metric.high, digits), metric.value, best)


def _paired_cell(column: Column, differences: Sequence[Difference], baseline: str) -> Cell:
    """Return the difference to the best baseline, with the name of the baseline unless the heading names it."""
    if not differences:
        return Cell("–")
    first, digits = differences[0], column.words.digits
    between = interval(first.low, first.high, digits) or "no interval"
    detail = between if baseline else f"{between}, against {first.baseline}"
    return Cell(signed(first.value, digits), detail, first.value, verdict=first.verdict)


def rank_of(column: Column, cell: Cell) -> tuple[bool, float]:
    """Return the key that sorts the cells of a column, the best first and empty ones last."""
    sign = -1 if column.words.higher else 1
    return cell.sort is None, sign * (cell.sort or 0.0)
