"""Operating points: the thresholds that a run applied, what they guarantee, and what they cost in coverage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_gradmetrics.evaluation.risk_rules import ACCEPTS_ALL
from lightning_gradmetrics.report.run import Run
from lightning_gradmetrics.report.wording import percent, short_number, whole

__all__ = ["Decisions", "decisions"]

BOTH = "all together"
"""The row of samples that all thresholds accept."""

Count = Mapping[str, Any]


@dataclass(frozen=True)
class Decisions:
    """The thresholds that a run applied.

    Args:
        rule: The rule and its arguments.
        guarantee: The guarantee in one sentence.
        headings: The headings of the columns.
        rows: For each score, its cells.
    """

    rule: str
    guarantee: str
    headings: list[str]
    rows: dict[str, list[str]]


def decisions(run: Run) -> Decisions | None:
    """Return the applied thresholds of a run with their guarantee and their cost; ``None`` if it applied none."""
    stored = run.thresholds
    shown = [name for name in stored.get("values", {}) if name in run.detectors]
    if not shown:
        return None
    by_score: dict[str | None, list[Count]] = {}
    for count in stored["accepted"]:
        if run.role_of(count["dataset"]):
            by_score.setdefault(count["score"], []).append(count)
    rows = {}
    for name in shown:
        limit = stored["values"][name]
        threshold = "none: accepts all" if limit == ACCEPTS_ALL else short_number(limit)
        rows[name] = [threshold, percent(stored["coverage"].get(name)), *_cells(run, by_score.get(name, []))]
    if None in by_score:
        rows[BOTH] = ["", "", *_cells(run, by_score[None])]
    headings = ["threshold", "coverage when fitted", *_headings(run, by_score.get(shown[0], []))]
    return Decisions(_rule(stored), str(stored["guarantee"]), headings, rows)


def _rule(stored: Mapping[str, Any]) -> str:
    """Return the rule, as in ``selective_risk(risk=0.05, delta=0.05), fitted on 1,000 rows``."""
    arguments = dict(stored["rule"])
    name = arguments.pop("name")
    listed = ", ".join(map("{0[0]}={0[1]!r}".format, arguments.items()))
    return f"{name}({listed}), fitted on {whole(stored['rows'])} rows"


def _split(run: Run, counts: Sequence[Count]) -> tuple[list[Count], list[Count]]:
    """Return the counts of the in-distribution datasets, and those of the others."""
    inside: list[Count] = []
    outside: list[Count] = []
    for count in counts:
        (inside if run.role_of(count["dataset"]) == "id" else outside).append(count)
    return inside, outside


def _headings(run: Run, counts: Sequence[Count]) -> list[str]:
    inside, outside = _split(run, counts)
    headings = ["coverage here", "errors among the accepted"] if inside else []
    for count in outside:
        headings.append(f"accepted of {count['dataset']}")
    return headings


def _cells(run: Run, counts: Sequence[Count]) -> list[str]:
    """Return the coverage and the error rate of in-distribution rows, and the accepted fraction of each other dataset."""
    inside, outside = _split(run, counts)
    cells = []
    if inside:
        cells += [_share(inside, "accepted", "rows"), _share(inside, "incorrect", "labelled")]
    for count in outside:
        cells.append(_share([count], "accepted", "rows"))
    return cells


def _share(counts: Sequence[Count], part: str, of: str) -> str:
    """Return one sum of counts as a percentage of another."""
    total = sum(count[of] for count in counts)
    chosen = sum(count[part] for count in counts)
    return percent(chosen / total if total else None)
