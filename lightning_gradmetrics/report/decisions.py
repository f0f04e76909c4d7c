"""Operating points: the thresholds that a run applied, what they guarantee, and what they cost in coverage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gradmetrics.report.run import Rows, Run
from lightning_gradmetrics.report.wording import percent, whole

__all__ = ["Decisions", "decisions"]

BOTH = "all together"
"""The row of samples that all thresholds accept."""


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
    values: dict[str, float] = {}
    for name, limit in stored.get("values", {}).items():
        if name in run.detectors:
            values[name] = limit
    if not values:
        return None
    inside, outside = run.split_by_role(run.finite_rows())
    headings = ["threshold", "coverage when fitted"]
    if inside:
        headings += ["coverage here", "errors among the accepted"]
    headings += map("accepted of {}".format, outside)
    rows = {}
    for name, limit in values.items():
        cells = [f"{limit:.4g}".replace("-", "\N{MINUS SIGN}"), percent(stored["coverage"].get(name))]
        rows[name] = [*cells, *_cells(list(inside.values()), list(outside.values()), {name: limit})]
    if stored.get("together"):
        rows[BOTH] = ["", "", *_cells(list(inside.values()), list(outside.values()), values)]
    return Decisions(_rule(stored), str(stored["guarantee"]), headings, rows)


def _rule(stored: Mapping[str, Any]) -> str:
    """Return the rule, as in ``SelectiveRisk(risk=0.05, delta=0.05), fitted on 1,000 rows``."""
    arguments = dict(stored["rule"])
    name = arguments.pop("name")
    listed = ", ".join(map("{0[0]}={0[1]!r}".format, arguments.items()))
    return f"{name}({listed}), fitted on {whole(stored['rows'])} rows"


def _cells(inside: Sequence[Rows], outside: Sequence[Rows], limits: Mapping[str, float]) -> list[str]:
    """Return the coverage and the error rate of in-distribution rows, and the accepted fraction of each other dataset."""
    cells = []
    if inside:
        accepted, incorrect = [], []
        for rows in inside:
            passed = _accepted(rows, limits)
            accepted.append(passed)
            incorrect.append(rows.incorrect[passed & rows.labelled])
        errors = np.concatenate(incorrect)
        rate = float(errors.mean()) if len(errors) else None
        cells += [percent(float(np.concatenate(accepted).mean())), percent(rate)]
    for rows in outside:
        cells.append(percent(float(_accepted(rows, limits).mean())))
    return cells


def _accepted(rows: Rows, limits: Mapping[str, float]) -> NDArray[np.bool_]:
    """Which rows all thresholds accept."""
    accepted: NDArray[np.bool_] = np.ones(len(rows.labelled), dtype=bool)
    for name, limit in limits.items():
        accepted &= rows.scores[name] <= limit
    return accepted
