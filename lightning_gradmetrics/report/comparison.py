"""The report over several runs: the best score of each question with its spread over the runs, and all values."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from lightning_gradmetrics.evaluation.metrics import SHOWN
from lightning_gradmetrics.report.main_table import Cell, Column, Table, rank_of
from lightning_gradmetrics.report.page import PAGE, source_of
from lightning_gradmetrics.report.plots import strip_svg
from lightning_gradmetrics.report.questions import REFERENCE, TASK_ORDER, Place
from lightning_gradmetrics.report.wording import percent, question_title, signed

__all__ = ["Spread", "render_comparison", "write_comparison"]

MOST_DOTS = 12
"""Largest number of scores in a picture."""

Row = Mapping[str, str]
"""A row of ``metrics.csv``."""


@dataclass(frozen=True)
class Spread:
    """The values of one metric in all runs that have it.

    Example:
        >>> Spread((0.9, 0.92)).text(1), Spread((0.9,)).text(1)
        ('91.0 ± 1.4', '90.0')
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the runs."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The standard deviation over the runs; None for one run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self, digits: int) -> str:
        """Return mean ± standard deviation, times 100."""
        mean = percent(self.mean, digits)
        return mean if self.deviation is None else f"{mean} ± {percent(self.deviation, digits)}"

    def extent(self, digits: int) -> str:
        """Return the smallest and the largest value, times 100."""
        return f"{percent(min(self.values), digits)} to {percent(max(self.values), digits)}"


@dataclass(frozen=True)
class ComparedQuestion:
    """A question with the spread of each score's AUROC, the best mean first."""

    title: str
    place: str
    spreads: Mapping[str, Spread]
    against_reference: str
    picture: Markup

    @property
    def best(self) -> str:
        """The score with the highest mean."""
        return next(iter(self.spreads))


Values = dict[Column, dict[str, dict[str, float]]]
"""Values by column, score and run."""


def render_comparison(runs: Mapping[str, Sequence[Row]], notes: Mapping[str, str] | None = None) -> str:
    """Return the report over several runs as one HTML document.

    Args:
        runs: The rows of each run's ``metrics.csv``, by the name of the run.
        notes: A short description of each run, such as its overrides.
    """
    values, fits = _values(runs)
    table = _table(values)
    shown = {}
    for name in runs:
        shown[name] = (notes or {}).get(name, "")
    content = {
        "questions": _questions(values),
        "table": table,
        "fits": fits,
        "runs": shown,
    }
    files = {"css": Markup(source_of("report.css")), "js": Markup(source_of("report.js"))}
    return PAGE.get_template("comparison.html.j2").render(files=files, **content)


def _values(runs: Mapping[str, Sequence[Row]]) -> tuple[Values, dict[str, str]]:
    """Return every value, and a description of the data that each score was fitted on."""
    values: Values = {}
    fits = {}
    for name, rows in runs.items():
        for row in rows:
            fits[row["score"]] = row["fit"]
            if row["value"] and row["metric"] in SHOWN.get(row["task"], ()):
                column = Column((row["task"], row["dataset"] or None, row["group"]), row["metric"])
                values.setdefault(column, {}).setdefault(row["score"], {})[name] = float(row["value"])
    return {column: values[column] for column in sorted(values, key=_position)}, fits


def _position(column: Column) -> tuple[int, str, bool, str, int]:
    task, dataset, group = column.place
    order = TASK_ORDER.index(task) if task in TASK_ORDER else len(TASK_ORDER)
    nearness = {"id": "0", "near": "1", "far": "2"}.get(group, f"3{group}")
    return order, nearness, dataset is None, dataset or "", SHOWN[task].index(column.metric)


def _table(values: Values) -> Table:
    headings: dict[str, int] = {}
    scores: dict[str, None] = {}
    for column, by_score in values.items():
        headings[column.heading] = headings.get(column.heading, 0) + 1
        scores.update(dict.fromkeys(by_score))
    table = Table(list(headings.items()), list(values))
    for score in scores:
        cells = []
        for column, by_score in values.items():
            cells.append(_cell(column, by_score, score))
        table.rows[score] = cells
    if table.columns:
        table.rows = dict(sorted(table.rows.items(), key=lambda item: rank_of(table.columns[0], item[1][0])))
    return table


def _cell(column: Column, by_score: Mapping[str, Mapping[str, float]], score: str) -> Cell:
    if score not in by_score:
        return Cell("–")
    digits = column.words.digits
    means = {}
    for name, by_run in by_score.items():
        means[name] = round(100 * statistics.fmean(by_run.values()), digits)
    best = max(means.values()) if column.words.higher else min(means.values())
    spread = Spread(tuple(by_score[score].values()))
    return Cell(spread.text(digits), spread.extent(digits), spread.mean, len(means) > 1 and means[score] == best)


def _questions(values: Values) -> list[ComparedQuestion]:
    """Return the questions: one per task and group, evaluated by the mean over the datasets of a group if there is one."""
    chosen: dict[tuple[str, str], Column] = {}
    for column in values:
        task, dataset, group = column.place
        if column.metric == "auroc" and (dataset is None or (task, group) not in chosen):
            chosen[task, group] = column
    questions = []
    for number, column in enumerate(chosen.values()):
        questions.append(_question(column, values[column], number))
    return questions


def _question(column: Column, by_score: Mapping[str, Mapping[str, float]], number: int) -> ComparedQuestion:
    task, dataset, group = column.place
    spreads, dots = {}, {}
    for name, by_run in by_score.items():
        spreads[name] = Spread(tuple(by_run.values()))
    ranked = dict(sorted(spreads.items(), key=lambda item: -item[1].mean))
    for name in list(ranked)[:MOST_DOTS]:
        dots[name] = np.array(ranked[name].values)
    task_and_dataset: Place = (task, dataset, group)
    picture = strip_svg(
        dots,
        label="AUROC × 100",
        title=f"AUROC of each run, {column.heading}. Best: {next(iter(ranked))}.",
        key=f"strip{number}",
    )
    against = _against_reference(by_score, next(iter(ranked)))
    where = dataset or f"mean over {group}"
    return ComparedQuestion(question_title(task_and_dataset[0], group), where, ranked, against, picture)


def _against_reference(by_score: Mapping[str, Mapping[str, float]], best: str) -> str:
    """Return a comparison of the best score with max softmax in the runs that have both."""
    if best == REFERENCE or REFERENCE not in by_score:
        return ""
    differences = []
    for run, value in by_score[best].items():
        if run in by_score[REFERENCE]:
            differences.append(value - by_score[REFERENCE][run])
    if not differences:
        return ""
    wins = sum(difference > 0 for difference in differences)
    deviation = f" ± {percent(statistics.stdev(differences))}" if len(differences) > 1 else ""
    mean = signed(statistics.fmean(differences))
    return f"against {REFERENCE}: {mean}{deviation}, higher in {wins} of {len(differences)} runs"


def write_comparison(runs: Mapping[str, Sequence[Row]], path: Path, notes: Mapping[str, str] | None = None) -> Path:
    """Write the report over several runs as a single HTML file that works offline, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_comparison(runs, notes), encoding="utf-8")
    return path
