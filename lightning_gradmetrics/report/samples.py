"""Uses of a score: accuracy at a coverage, thresholds, and the most and least uncertain samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from markupsafe import Markup

from lightning_gradmetrics.evaluation import fit_thresholds
from lightning_gradmetrics.meters import functional
from lightning_gradmetrics.report.run import Rows, Run, picture_source
from lightning_gradmetrics.report.wording import percent, short_number

__all__ = ["KEPT", "Sample", "SampleTable", "accuracies", "listed_samples", "sample_tables", "thresholds"]

KEPT = (1.0, 0.95, 0.9, 0.8)
"""The coverages of the operating points."""

NO_PICTURE = Markup("")

SHOWN = 5
"""Number of samples listed at each end."""

ACCEPTED = 0.95
"""The fraction of in-distribution samples that the threshold accepts."""


@dataclass(frozen=True)
class Sample:
    """A sample as shown in the report; ``incorrect`` if its label is known and differs from the prediction."""

    index: int
    prediction: str
    label: str
    value: str
    incorrect: bool
    path: str = ""
    picture: Markup = NO_PICTURE


@dataclass(frozen=True)
class SampleTable:
    """The samples of a dataset with the highest or the lowest value of a score."""

    title: str
    labelled: bool
    rows: list[Sample]

    @property
    def has_pictures(self) -> bool:
        """Whether every sample has a thumbnail."""
        return bool(self.rows) and all(sample.picture for sample in self.rows)


def accuracies(rows: Rows, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the accuracy of the retained samples for each score and each coverage in ``KEPT``."""
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
    """Return the fractions of samples rejected by a threshold that accepts 95 % of the in-distribution samples.

    Args:
        run: The run.
        names: The scores.

    Returns:
        The headings of the columns, and for each score its threshold and the rejected fraction in each column.
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
        limit = fit_thresholds(fit_on, [name], tpr=ACCEPTED).values[name]
        groups = [values[wrong]] if wrong.any() else []
        for rows in outside.values():
            groups.append(rows.scores[name])
        table[name] = [short_number(limit)]
        for group in groups:
            table[name].append(percent(float((group > limit).mean())))
    return headings, table


def extreme_rows(rows: Rows, score: str, count: int = SHOWN) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the rows with the highest and with the lowest values of a score."""
    values = rows.scores[score]
    usable = np.flatnonzero(np.isfinite(values))
    order = usable[np.argsort(-values[usable], kind="stable")]
    return order[:count], order[::-1][:count]


def listed_samples(run: Run, names: Sequence[str]) -> dict[str, list[int]]:
    """Return the indices of the samples that the report lists for some scores, by dataset."""
    listed = {}
    for dataset, rows in run.finite_rows().items():
        indices: set[int] = set()
        for name in names:
            for which in extreme_rows(rows, name):
                indices.update(rows.index[which].tolist())
        listed[dataset] = sorted(indices)
    return listed


def sample_tables(run: Run, score: str) -> list[SampleTable]:
    """Return the most and the least uncertain samples of each dataset."""
    tables = []
    for name, rows in run.finite_rows().items():
        highest, lowest = extreme_rows(rows, score)
        labelled = bool(rows.labelled.any())
        tables.append(SampleTable(f"{name}: most uncertain", labelled, _samples(run, name, rows, score, highest)))
        tables.append(SampleTable(f"{name}: least uncertain", labelled, _samples(run, name, rows, score, lowest)))
    return tables


def _samples(run: Run, dataset: str, rows: Rows, score: str, which: np.ndarray) -> list[Sample]:
    samples = []
    paths = run.paths_of(dataset, rows.index[which].tolist())
    for position in which:
        index, labelled = int(rows.index[position]), bool(rows.labelled[position])
        file = run.thumbnails.get(dataset, {}).get(str(index))
        value = short_number(float(rows.scores[score][position]), 3)
        samples.append(
            Sample(
                index,
                run.class_name(int(rows.prediction[position])),
                run.class_name(int(rows.label[position])) if labelled else "–",
                value,
                bool(rows.incorrect[position]),
                paths.get(index, ""),
                picture_source(run.directory / file) if file else NO_PICTURE,
            )
        )
    return samples
