"""What to do with a score: accuracy at a coverage, thresholds, and the most and least trusted samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from lightning_gradmetrics.evaluation import fit_thresholds
from lightning_gradmetrics.meters import functional
from lightning_gradmetrics.report.run import Rows, Run
from lightning_gradmetrics.report.wording import percent

__all__ = ["KEPT", "SampleTable", "accuracies", "sample_tables", "thresholds"]

KEPT = (1.0, 0.95, 0.9, 0.8)
"""The coverages of the operating points."""

ACCEPTED = 0.95
"""The share of in-distribution samples that a threshold accepts."""


@dataclass(frozen=True)
class SampleTable:
    """The samples of a dataset with the highest or the lowest value of a score."""

    title: str
    labelled: bool
    rows: list[tuple[int, str, str, str]]


def accuracies(rows: Rows, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the accuracy of each score among the retained samples, for each coverage of ``KEPT``."""
    table: dict[str, list[str]] = {}
    for name in names:
        known = rows.labelled & np.isfinite(rows.scores[name])
        if known.any():
            values = torch.from_numpy(rows.scores[name][known])
            errors = torch.from_numpy(rows.incorrect[known]).int()
            table[name] = []
            for coverage in KEPT:
                table[name].append(percent(float(functional.accuracy_at_coverage(values, errors, coverage))))
    return table


def thresholds(run: Run, names: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Return what a threshold that accepts 95 % of the in-distribution samples rejects.

    Args:
        run: The run.
        names: The scores.

    Returns:
        The headings of the columns, and for each score its threshold and the share of rejected samples in each.
    """
    finite = run.finite_rows()
    inside, outside = run.split_by_role(finite)
    if not inside:
        return [], {}
    is_inside = pc.is_in(run.results["dataset"], pa.array(list(inside), pa.string()))
    fit_on = run.results.filter(is_inside)
    wrong = np.concatenate([rows.incorrect for rows in inside.values()])
    headings = ["threshold", *(["incorrect"] if wrong.any() else []), *outside]
    table: dict[str, list[str]] = {}
    for name in names:
        values = np.concatenate([rows.scores[name] for rows in inside.values()])
        if not np.isfinite(values).any():
            continue
        limit = fit_thresholds(fit_on, [name], ACCEPTED).values[name]
        groups = [values[wrong]] if wrong.any() else []
        for rows in outside.values():
            groups.append(rows.scores[name])
        table[name] = [f"{limit:.4g}".replace("-", "\N{MINUS SIGN}")]
        for group in groups:
            table[name].append(percent(float((group > limit).mean())))
    return headings, table


def sample_tables(run: Run, score: str, count: int = 5) -> list[SampleTable]:
    """Return the most and the least uncertain samples of each dataset."""
    tables = []
    for name, rows in run.finite_rows().items():
        values = rows.scores[score]
        usable = np.flatnonzero(np.isfinite(values))
        order = usable[np.argsort(-values[usable], kind="stable")]
        tables.append(_samples(f"{name}: most uncertain", rows, score, order[:count]))
        tables.append(_samples(f"{name}: least uncertain", rows, score, order[::-1][:count]))
    return tables


def _samples(title: str, rows: Rows, score: str, which: np.ndarray) -> SampleTable:
    shown = []
    for place in which:
        prediction = str(rows.prediction[place]) if rows.prediction[place] >= 0 else "–"
        label = str(rows.label[place]) if rows.labelled[place] else "–"
        value = f"{rows.scores[score][place]:.4g}".replace("-", "\N{MINUS SIGN}")
        shown.append((int(rows.index[place]), prediction, label, value))
    return SampleTable(title, bool(rows.labelled.any()), shown)
