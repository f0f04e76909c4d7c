"""A table of all scores: their detection performance, costs and needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_gradmetrics.evaluation import Evaluation
from lightning_gradmetrics.report.tables.documents import markdown
from lightning_gradmetrics.report.tables.grid import Column, Grid, Group
from lightning_gradmetrics.report.tables.marks import detects, kind_of, mark_notes, mark_of
from lightning_gradmetrics.results.replacing import write_csv, write_text
from lightning_gradmetrics.scores import Score

__all__ = ["cost_grid", "cost_grid_of_width", "cost_records", "write_costs"]

Record = dict[str, Any]
Area = tuple[float, float | None, float | None]
"""An AUROC and its interval."""

ERRORS = "errors"
COSTS = ("milliseconds", "predictions", "extra_mib")


def cost_records(evaluation: Evaluation, scores: Sequence[Score], costs: Sequence[Record]) -> list[Record]:
    """Return one dict per score: the AUROC of each question with its interval, costs and needs; baselines first.

    Args:
        evaluation: The evaluation of the run; a score that is not in it has no AUROC.
        scores: The scores.
        costs: The result of :func:`lightning_gradmetrics.cli.cost_measurement.score_costs`.

    Returns:
        ``score``, ``family``, ``kind`` (its fit, see :func:`~lightning_gradmetrics.report.tables.marks.kind_of`), ``mark``;
        ``aurocs``, a mapping from a question (``"errors"``, or the role of out-of-distribution sets, for which it is
        the mean) to ``(value, low, high)``; the costs; ``backward``, whether it needs a backward pass.
    """
    measured = {cost["score"]: cost for cost in costs}
    records = []
    for score in sorted(scores, key=lambda score: score.recipe.family):
        cost = measured[score.name]
        records.append(
            {
                "score": score.name,
                "family": score.recipe.family,
                "kind": kind_of(score),
                "mark": mark_of(score),
                "aurocs": _aurocs(evaluation, score),
                **{key: cost[key] for key in COSTS},
                "backward": score.needs.backward,
            }
        )
    return records


def _aurocs(evaluation: Evaluation, score: Score) -> dict[str, Area]:
    """Return the AUROC by question (the mean of a role's sets); empty for a score that reads labels."""
    aurocs: dict[str, Area] = {}
    if not detects(score):
        return aurocs
    for metric in evaluation.find(score=score.name, metric="auroc"):
        if metric["task"] == "joint":
            continue
        question = ERRORS if metric["task"] == "misclassification" else metric["group"]
        if metric["value"] is not None and (question not in aurocs or metric["dataset"] is None):
            aurocs[question] = (metric["value"], metric["low"], metric["high"])
    return aurocs


def _questions(records: Sequence[Record]) -> list[str]:
    questions: dict[str, None] = {}
    for record in records:
        questions.update(dict.fromkeys(record["aurocs"]))
    return list(questions)


def cost_grid_of_width(records: Sequence[Record], scores: Sequence[Score], width: int) -> Grid:
    """Return the table for a console of a given width: if too wide, without intervals, then without the last questions.

    Args:
        records: The result of :func:`cost_records`.
        scores: The scores, for the notes.
        width: The number of characters in a line.
    """
    questions = _questions(records)
    grid = cost_grid(records, scores, questions, intervals=True)
    while grid.width > width and questions:
        grid = cost_grid(records, scores, questions, intervals=False)
        questions = questions[:-1]
    return grid


def cost_grid(records: Sequence[Record], scores: Sequence[Score], questions: Sequence[str], intervals: bool) -> Grid:
    """Return the table with some questions, with or without the intervals of their AUROCs."""
    families = [record["family"] for record in records]
    ends = {row for row in range(len(families) - 1) if families[row] != families[row + 1]}
    left_out = [] if intervals else ["More columns in costs.csv: intervals, and questions that do not fit."]
    return Grid(
        title="AUROC times 100 with 95 % intervals, and costs",
        names=Column("score", _cells(records, "score"), left=True),
        groups=(
            Group("", (Column("", _marks(records), left=True),)),
            Group("AUROC ↑", tuple(_auroc_columns(records, questions, intervals))),
            Group("costs", tuple(_cost_columns(records))),
        ),
        section_ends=frozenset(ends),
        notes=(
            *left_out,
            "ms: per sample, prediction included. MiB: memory above that of a prediction. B: needs a backward pass.",
            *mark_notes(scores),
        ),
    )


def _cells(records: Sequence[Record], key: str, digits: int | None = None) -> tuple[str, ...]:
    cells = []
    for record in records:
        cells.append(record[key] if digits is None else f"{record[key]:.{digits}f}")
    return tuple(cells)


def _marks(records: Sequence[Record]) -> tuple[str, ...]:
    """Return the marks of the scores, with ``B`` if a backward pass is needed."""
    marks = []
    for record in records:
        marks.append(f"{record['mark']:<2} B" if record["backward"] else record["mark"])
    return tuple(marks)


def _auroc_columns(records: Sequence[Record], questions: Sequence[str], intervals: bool) -> Iterator[Column]:
    for question in questions:
        areas = [record["aurocs"].get(question) for record in records]
        best = max(area[0] for area in areas if area is not None)
        rows = {row for row, area in enumerate(areas) if area is not None and area[0] == best}
        yield Column(question, tuple(_area_text(area, intervals) for area in areas), frozenset(rows))


def _area_text(area: Area | None, intervals: bool) -> str:
    if area is None:
        return "–"
    value, low, high = area
    if not intervals or low is None or high is None:
        return f"{100 * value:.1f}"
    return f"{100 * value:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _cost_columns(records: Sequence[Record]) -> Iterator[Column]:
    yield Column("ms", _cells(records, "milliseconds", 3))
    yield Column("MiB", _cells(records, "extra_mib", 1))


def write_costs(records: Sequence[Record], scores: Sequence[Score], directory: Path) -> list[Path]:
    """Write ``costs.csv``, with unrounded numbers, and ``costs.md``, the table as Markdown.

    Args:
        records: The result of :func:`cost_records`.
        scores: The scores, for the notes.
        directory: The run directory.
    """
    questions = _questions(records)
    rows = []
    for record in records:
        row = {key: value for key, value in record.items() if key not in ("aurocs", "mark")}
        for question in questions:
            value, low, high = record["aurocs"].get(question, (None, None, None))
            row |= {f"{question}_auroc": value, f"{question}_low": low, f"{question}_high": high}
        rows.append(row)
    text = markdown(cost_grid(records, scores, questions, intervals=True))
    return [write_csv(directory / "costs.csv", rows), write_text(directory / "costs.md", text)]
