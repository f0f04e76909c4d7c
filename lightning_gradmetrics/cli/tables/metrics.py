"""The main table: every score's detection metrics, laid out so that a console of any width shows whole numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_gradmetrics.cli.tables.grid import Column, Grid, Group
from lightning_gradmetrics.cli.tables.marks import mark_notes, mark_of
from lightning_gradmetrics.evaluation import HIGHER_IS_BETTER, Evaluation
from lightning_gradmetrics.evaluation.metrics import METRICS, SHOWN
from lightning_gradmetrics.scores import Score

__all__ = ["Question", "metric_text", "metrics_grid", "metrics_grids", "notes_of", "questions_of"]

TASKS = ("misclassification", "ood")
"""The tasks of the main table; others are in metrics.csv."""

UNDEFINED = "–"

Place = tuple[str, str, str | None]
"""A task, a group, and a data set; ``None`` is the mean over the group's data sets."""


@dataclass(frozen=True)
class Question:
    """What is detected: errors, or one group of out-of-distribution data.

    Args:
        task: ``"misclassification"`` or ``"ood"``.
        group: The role of the data sets.
        datasets: Their names; with several of them there is a mean as well.
    """

    task: str
    group: str
    datasets: tuple[str, ...]

    @property
    def name(self) -> str:
        """``errors``, or the name of the group."""
        return "errors" if self.task == "misclassification" else self.group

    @property
    def places(self) -> list[Place]:
        """Each data set, and the mean over several."""
        means = [None] if len(self.datasets) > 1 else []
        return [(self.task, self.group, dataset) for dataset in (*self.datasets, *means)]

    @property
    def mean(self) -> list[Place]:
        """The mean over the data sets, or the only data set."""
        return self.places[-1:]


def questions_of(evaluation: Evaluation) -> list[Question]:
    """The questions with at least one defined metric, errors first, then the groups in the order of the data sets."""
    defined = {(m["task"], m["dataset"]) for m in evaluation.metrics if m["value"] is not None}
    members: dict[tuple[str, str], list[str]] = {}
    for task in TASKS:
        for dataset in evaluation.datasets:
            if (task, dataset["name"]) in defined:
                members.setdefault((task, dataset["role"]), []).append(dataset["name"])
    return [Question(task, group, tuple(names)) for (task, group), names in members.items()]


@dataclass(frozen=True)
class Selection:
    """The columns of one grid: some places, with all metrics of their task or only the first."""

    title: str
    places: tuple[Place, ...]
    all_metrics: bool


def metrics_grid(evaluation: Evaluation, scores: Sequence[Score]) -> Grid:
    """The whole table: all data sets, all means, all metrics that the protocol shows."""
    return _grid(_everything(questions_of(evaluation), all_metrics=True), evaluation, scores)


def metrics_grids(evaluation: Evaluation, scores: Sequence[Score], width: int) -> list[Grid]:
    """The table for a console of a width: one grid, or one per question.

    While the table is too wide, it first loses FPR95 and AURC. Then it becomes one grid per question. A grid that is
    still too wide loses FPR95 and AURC, then every column but the mean over its data sets. The last grid has a note on
    what was left out, and on the file that has it.

    Args:
        evaluation: The evaluation.
        scores: The scores, which become the rows, baselines first.
        width: The number of characters in a line.
    """
    questions = questions_of(evaluation)
    for all_metrics in (True, False):
        selection = _everything(questions, all_metrics)
        grid = _grid(selection, evaluation, scores)
        if grid.width <= width:
            return [_with_notes(grid, [selection], questions)]
    chosen = [_first_that_fits(question, evaluation, scores, width) for question in questions]
    grids = [_grid(selection, evaluation, scores) for selection in chosen]
    return [*grids[:-1], _with_notes(grids[-1], chosen, questions)]


def _everything(questions: Sequence[Question], all_metrics: bool) -> Selection:
    places: list[Place] = []
    for question in questions:
        places += question.places
    return Selection("", tuple(places), all_metrics)


def _first_that_fits(question: Question, evaluation: Evaluation, scores: Sequence[Score], width: int) -> Selection:
    """The widest selection of one question that fits, or the narrowest."""
    for selection in _narrowing(question):
        if _grid(selection, evaluation, scores).width <= width:
            break
    return selection


def _narrowing(question: Question) -> Iterator[Selection]:
    """The selections of one question, from the widest to the narrowest."""
    for places in (question.places, question.mean):
        for all_metrics in (True, False):
            yield Selection(question.name, tuple(places), all_metrics)


def _with_notes(grid: Grid, selections: Sequence[Selection], questions: Sequence[Question]) -> Grid:
    return replace(grid, notes=tuple(_left_out(selections, questions)))


def _left_out(selections: Sequence[Selection], questions: Sequence[Question]) -> list[str]:
    """Which metrics and data sets the selections lack, and where they are."""
    notes = []
    if not all(selection.all_metrics for selection in selections):
        notes.append("More metrics in metrics.csv: AURC, FPR95.")
    shown = {place for selection in selections for place in selection.places}
    for question in questions:
        if missing := sum(place not in shown for place in question.places):
            notes.append(f"{question.name}: {missing} more data sets in metrics.csv.")
    return notes


def _grid(selection: Selection, evaluation: Evaluation, scores: Sequence[Score]) -> Grid:
    rows = sorted(scores, key=lambda score: score.recipe.family)
    table = _Values(evaluation, rows)
    marks = tuple(mark_of(score) for score in rows)
    marked = (Group("", (Column("", marks, left=True),)),) if any(marks) else ()
    families = [score.recipe.family for score in rows]
    ends = {row for row in range(len(rows) - 1) if families[row] != families[row + 1]}
    return Grid(
        title=selection.title,
        names=Column("score", tuple(score.name for score in rows), left=True),
        groups=(*marked, *table.groups(selection)),
        section_ends=frozenset(ends),
    )


class _Values:
    """The metrics of an evaluation as columns with one cell per score."""

    def __init__(self, evaluation: Evaluation, rows: Sequence[Score]) -> None:
        self.rows = rows
        self.questions = questions_of(evaluation)
        self.values = {}
        for metric in evaluation.metrics:
            place = (metric["task"], metric["group"], metric["dataset"])
            self.values[place, metric["score"], metric["metric"]] = metric["value"]

    def groups(self, selection: Selection) -> list[Group]:
        """One group per place; its heading names the question unless the title does."""
        groups = []
        for place in selection.places:
            task, group, dataset = place
            question = next(q for q in self.questions if (q.task, q.group) == (task, group))
            where = dataset if dataset is not None else f"mean of {len(question.datasets)}"
            heading = where if selection.title else f"{question.name}: {where}"
            metrics = SHOWN[task] if selection.all_metrics else SHOWN[task][:1]
            groups.append(Group(heading, tuple(self.column(place, metric) for metric in metrics)))
        return groups

    def column(self, place: Place, metric: str) -> Column:
        """One metric of every score."""
        values = [self.values.get((place, score.name, metric)) for score in self.rows]
        cells = tuple(metric_text(metric, value) for value in values)
        arrow = "↑" if HIGHER_IS_BETTER[metric] else "↓"
        return Column(f"{METRICS[metric].title} {arrow}", cells, _best_rows(metric, values, cells))


def notes_of(evaluation: Evaluation, scores: Sequence[Score]) -> list[str]:
    """What the numbers are, the data sets, the marks of the scores, and the notes of the evaluation."""
    datasets = "; ".join(_dataset_text(dataset) for dataset in evaluation.datasets)
    meaning = "Metrics times 100. Bold: the best of its column. errors: misclassified against correct samples."
    return [meaning, f"{datasets}.", *mark_notes(scores), *evaluation.notes]


def _dataset_text(dataset: Mapping[str, Any]) -> str:
    accuracy = dataset["accuracy"]
    known = "" if accuracy is None else f", accuracy {100 * accuracy:.1f}"
    return f"{dataset['name']}: {dataset['rows']} samples ({dataset['role']}){known}"


def metric_text(metric: str, value: float | None) -> str:
    """A metric times 100 with the metric's number of decimals.

    Example:
        >>> metric_text("auroc", 1.0), metric_text("aurc", 0.0097), metric_text("auroc", None)
        ('100.0', '0.97', '–')
    """
    return UNDEFINED if value is None else f"{100 * value:.{METRICS[metric].digits}f}"


def _best_rows(metric: str, values: Sequence[float | None], cells: Sequence[str]) -> frozenset[int]:
    """The rows whose text equals that of the best value."""
    defined = [value for value in values if value is not None]
    if not defined:
        return frozenset()
    best = metric_text(metric, max(defined) if HIGHER_IS_BETTER[metric] else min(defined))
    return frozenset(row for row, cell in enumerate(cells) if cell == best)
