"""The main table: the detection metrics of every score, in a layout that never truncates a number at any width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_gradmetrics.evaluation import Evaluation
from lightning_gradmetrics.evaluation.metrics import METRICS, SHOWN
from lightning_gradmetrics.report.tables.grid import Column, Grid, Group
from lightning_gradmetrics.report.tables.marks import mark_notes, mark_of
from lightning_gradmetrics.scores import Score

__all__ = ["Question", "metric_text", "metrics_grid", "metrics_grids", "notes_of", "questions_of", "summary_grids"]

SEPARATE = ("misclassification", "ood")
"""The tasks of the first grid."""

TOGETHER = ("joint",)
"""The tasks of a second grid if one is too narrow: errors and OOD samples together."""

UNDEFINED = "–"

Place = tuple[str, str, str | None]
"""A task, a group, and a dataset; ``None`` is the mean over the group's datasets."""


@dataclass(frozen=True)
class Question:
    """The detection problem: errors, one group of out-of-distribution data, or both together.

    Args:
        task: ``"misclassification"``, ``"ood"`` or ``"joint"``.
        group: The role of the datasets.
        datasets: The names of the datasets; several also have a mean.
    """

    task: str
    group: str
    datasets: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name: ``errors``, the name of the group, or ``errors and`` the name of the group."""
        return {"misclassification": "errors", "joint": f"errors and {self.group}"}.get(self.task, self.group)

    @property
    def places(self) -> list[Place]:
        """The task, group and dataset of each entry: one per dataset, and one for the mean over several."""
        places: list[Place] = []
        for dataset in self.datasets:
            places.append((self.task, self.group, dataset))
        if len(places) > 1:
            places.append((self.task, self.group, None))
        return places

    @property
    def mean(self) -> list[Place]:
        """The entry of the mean over the datasets, or of the only dataset."""
        return self.places[-1:]


def questions_of(evaluation: Evaluation) -> list[Question]:
    """Return the questions with a defined metric: errors, each group in the order of the datasets, then both together."""
    defined = set()
    for metric in evaluation.metrics:
        if metric["value"] is not None:
            defined.add((metric["task"], metric["dataset"]))
    members: dict[tuple[str, str], list[str]] = {}
    for task in (*SEPARATE, *TOGETHER):
        for dataset in evaluation.datasets:
            if (task, dataset["name"]) in defined:
                members.setdefault((task, dataset["role"]), []).append(dataset["name"])
    questions = []
    for (task, group), names in members.items():
        questions.append(Question(task, group, tuple(names)))
    return questions


@dataclass(frozen=True)
class Selection:
    """The columns of one grid: some tasks and datasets, with all metrics of a task or only the first one."""

    title: str
    places: tuple[Place, ...]
    all_metrics: bool


def metrics_grid(evaluation: Evaluation, scores: Sequence[Score]) -> Grid:
    """Return the whole table: all datasets, all means, and all metrics that the protocol shows."""
    return _grid(_everything(questions_of(evaluation), all_metrics=True), evaluation, scores)


def metrics_grids(evaluation: Evaluation, scores: Sequence[Score], width: int) -> list[Grid]:
    """Return the table for a console of a width: one grid, or one per question.

    If the whole table is too wide, it is split into two parts: errors and OOD detection, and both together. A part that
    is too wide is first shown without FPR95 and AURC, and then as one grid per question. A grid that is still too wide
    is shown without FPR95 and AURC, and then with only the mean over its datasets. The last grid has a note on what was
    left out and where to find it.

    Args:
        evaluation: The evaluation.
        scores: The scores; each is a row, with baselines first.
        width: The number of characters in a line.
    """
    questions = questions_of(evaluation)
    whole = _grid(_everything(questions, all_metrics=True), evaluation, scores)
    if whole.width <= width or not questions:
        return [whole]
    chosen: list[Selection] = []
    for tasks in (SEPARATE, TOGETHER):
        asked = [question for question in questions if question.task in tasks]
        chosen += _selections_of_part(asked, evaluation, scores, width) if asked else []
    grids = []
    for selection in chosen:
        grids.append(_grid(selection, evaluation, scores))
    return [*grids[:-1], replace(grids[-1], notes=tuple(_left_out(chosen, questions)))]


def summary_grids(evaluation: Evaluation, scores: Sequence[Score], width: int) -> list[Grid]:
    """Return :func:`metrics_grids` with all notes below the last grid, or an empty grid with notes if nothing was evaluated."""
    grids = metrics_grids(evaluation, scores, width) if scores else [Grid("", Column("score", ()), ())]
    notes = (*grids[-1].notes, *notes_of(evaluation, scores))
    return [*grids[:-1], replace(grids[-1], notes=notes)]


def _selections_of_part(
    questions: Sequence[Question], evaluation: Evaluation, scores: Sequence[Score], width: int
) -> list[Selection]:
    """Return one selection of all questions if it fits, or one per question."""
    for all_metrics in (True, False):
        selection = _everything(questions, all_metrics)
        if _grid(selection, evaluation, scores).width <= width:
            return [selection]
    selections = []
    for question in questions:
        selections.append(_first_that_fits(question, evaluation, scores, width))
    return selections


def _everything(questions: Sequence[Question], all_metrics: bool) -> Selection:
    places: list[Place] = []
    for question in questions:
        places += question.places
    return Selection("", tuple(places), all_metrics)


def _first_that_fits(question: Question, evaluation: Evaluation, scores: Sequence[Score], width: int) -> Selection:
    """Return the widest selection of one question whose table fits; the narrowest if none does."""
    for selection in _narrowing(question):
        if _grid(selection, evaluation, scores).width <= width:
            break
    return selection


def _narrowing(question: Question) -> Iterator[Selection]:
    """Yield the selections of one question, from the widest to the narrowest."""
    for places in (question.places, question.mean):
        for all_metrics in (True, False):
            yield Selection(question.name, tuple(places), all_metrics)


def _left_out(selections: Sequence[Selection], questions: Sequence[Question]) -> list[str]:
    """Return notes on the metrics and datasets that the selections leave out, and the file that contains them."""
    shown: set[Any] = set()
    notes, is_complete = [], True
    for selection in selections:
        shown.update(selection.places)
        is_complete = is_complete and selection.all_metrics
    if not is_complete:
        notes.append("More metrics in metrics.csv: AURC, FPR95.")
    for question in questions:
        missing = len(set(question.places) - shown)
        if missing:
            notes.append(f"{question.name}: {missing} more datasets in metrics.csv.")
    return notes


def _grid(selection: Selection, evaluation: Evaluation, scores: Sequence[Score]) -> Grid:
    rows = sorted(scores, key=lambda score: score.recipe.family)
    table = _Values(evaluation, rows)
    names, marks, ends = [], [], set()
    for row, score in enumerate(rows):
        names.append(score.name)
        marks.append(mark_of(score))
        if row and score.recipe.family != rows[row - 1].recipe.family:
            ends.add(row - 1)
    marked = (Group("", (Column("", tuple(marks), left=True),)),) if any(marks) else ()
    return Grid(
        title=selection.title,
        names=Column("score", tuple(names), left=True),
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
            task_and_dataset = (metric["task"], metric["group"], metric["dataset"])
            self.values[task_and_dataset, metric["score"], metric["metric"]] = metric["value"]

    def groups(self, selection: Selection) -> list[Group]:
        """Return one group per question and dataset; its heading names the question unless the title does so."""
        groups = []
        for task_and_dataset in selection.places:
            task, _, dataset = task_and_dataset
            question = self._question_of(task_and_dataset)
            where = dataset if dataset is not None else f"mean of {len(question.datasets)}"
            heading = where if selection.title else f"{question.name}: {where}"
            columns = []
            for metric in SHOWN[task] if selection.all_metrics else SHOWN[task][:1]:
                columns.append(self.column(task_and_dataset, metric))
            groups.append(Group(heading, tuple(columns)))
        return groups

    def _question_of(self, place: Place) -> Question:
        return next(question for question in self.questions if (question.task, question.group) == place[:2])

    def column(self, place: Place, metric: str) -> Column:
        """Return one metric of every score."""
        values, cells = [], []
        for score in self.rows:
            value = self.values.get((place, score.name, metric))
            values.append(value)
            cells.append(metric_text(metric, value))
        arrow = "↑" if METRICS[metric].higher_is_better else "↓"
        return Column(f"{METRICS[metric].title} {arrow}", tuple(cells), _best_rows(metric, values, cells))


def notes_of(evaluation: Evaluation, scores: Sequence[Score]) -> list[str]:
    """Return notes on the numbers, the datasets, the marks of the scores, and the evaluation."""
    datasets = "; ".join(map(_dataset_text, evaluation.datasets))
    meaning = "Metrics times 100. Bold: the best of its column. errors: misclassified against correct samples."
    return [meaning, *_joint_notes(evaluation), f"{datasets}.", *mark_notes(scores), *evaluation.notes]


def _joint_notes(evaluation: Evaluation) -> list[str]:
    """Return an explanation of the joint columns, if there are any."""
    joint = [question for question in questions_of(evaluation) if question.task in TOGETHER]
    share = 100 * evaluation.settings.get("ood_share", 0.5)
    first = (
        f"{joint[0].name}: what a threshold must reject, with {share:g} % OOD samples in the mixture." if joint else ""
    )
    return [first] if first else []


def _dataset_text(dataset: Mapping[str, Any]) -> str:
    accuracy = dataset["accuracy"]
    known = "" if accuracy is None else f", accuracy {100 * accuracy:.1f}"
    return f"{dataset['name']}: {dataset['rows']} samples ({dataset['role']}){known}"


def metric_text(metric: str, value: float | None) -> str:
    """Return a metric times 100 with the metric's number of decimals.

    Example:
        >>> metric_text("auroc", 1.0), metric_text("aurc", 0.0097), metric_text("auroc", None)
        ('100.0', '0.97', '–')
    """
    return UNDEFINED if value is None else f"{100 * value:.{METRICS[metric].digits}f}"


def _best_rows(metric: str, values: Sequence[float | None], cells: Sequence[str]) -> frozenset[int]:
    """Return the rows whose text equals that of the best value."""
    defined = [value for value in values if value is not None]
    if not defined:
        return frozenset()
    best = metric_text(metric, max(defined) if METRICS[metric].higher_is_better else min(defined))
    return frozenset(row for row, cell in enumerate(cells) if cell == best)
