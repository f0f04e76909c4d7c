"""Compares scores fitted on many features, labels or out-of-distribution samples with the best other score."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lightning_gradmetrics.evaluation import evaluate
from lightning_gradmetrics.evaluation.tasks import ID
from lightning_gradmetrics.report.tables.grid import Column, Grid, Group
from lightning_gradmetrics.results.replacing import write_csv, write_text
from lightning_gradmetrics.scores import FittedScore, Score

__all__ = ["compare_fitted", "fitted_comparison_grids", "write_fitted_comparison"]

REFERENCES = ("single", "baseline")
"""The references of candidates: the best score that is not a candidate, and the best of those without gradients."""

Record = dict[str, Any]


def compare_fitted(
    results: pa.Table,
    scores: Sequence[Score],
    roles: Mapping[str, str],
    without: Mapping[str, str | None],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Record]:
    """Return the AUROC of every candidate, and its differences to the best single score and to the best baseline.

    Candidates are the ``combination`` scores, and all scores that are fitted on labels or on out-of-distribution
    samples. All other scores are single scores, unless they read the label of the row they score. The best single score
    is the one with the largest AUROC on the evaluated rows, which favours it: a candidate that beats it would beat any
    single score chosen in advance. Intervals are those of :func:`lightning_gradmetrics.evaluation.evaluate`: they
    include the variation of the rows but not of the fits, and are not corrected for the number of candidates.

    Args:
        results: Per-sample results, with scores from fits that did not include the row.
        scores: The scores of its columns.
        roles: The role of each dataset.
        without: For each column, the dataset that all of its fits left out, if any; the column is evaluated on that set
            only.
        resamples: Bootstrap resamples.
        seed: The seed of the resamples.

    Returns:
        One dict per task, dataset and candidate: ``task``, ``dataset``, ``group`` (its role), ``score``,
        ``fitted_on``, ``auroc``, ``low``, ``high``; ``single``, the name of the best single score, and
        ``single_auroc``, ``single_difference``, ``single_low``, ``single_high`` and ``single_verdict`` (``better``,
        ``worse`` or ``cannot tell``), which are missing without resamples; and the same for ``baseline``.
    """
    names = [score.name for score in scores]
    aurocs = evaluate(results, names, roles, resamples=0).find(metric="auroc")
    records = []
    for entry in aurocs:
        if entry["score"] != names[0] or entry["dataset"] is None or entry["value"] is None or entry["task"] == "joint":
            continue
        where = {key: entry[key] for key in ("task", "dataset", "group")}
        best = _best_references(scores, _values_at(aurocs, where))
        candidates = _candidates(scores, without, entry["dataset"])
        rows = _rows_of(results, roles, entry["task"], entry["dataset"])
        compared = _compared(rows, [c.name for c in candidates], best, roles, entry["task"], resamples, seed)
        for candidate in candidates:
            fitted_on = _fitted_on(candidate, without.get(candidate.name))
            records.append({**where, "score": candidate.name, "fitted_on": fitted_on, **compared[candidate.name]})
    return records


def _values_at(aurocs: Sequence[Record], where: Record) -> dict[str, float]:
    values = {}
    for record in aurocs:
        if where.items() <= record.items():
            values[record["score"]] = record["value"]
    return values


def _is_candidate(score: Score) -> bool:
    if not isinstance(score, FittedScore):
        return False
    needs = score.fit_needs
    return score.recipe.name == "combination" or needs.labels or needs.ood


def _candidates(scores: Sequence[Score], without: Mapping[str, str | None], dataset: str) -> list[FittedScore]:
    """Return the candidates whose fits may be evaluated on a dataset."""
    candidates = []
    for score in scores:
        if isinstance(score, FittedScore) and _is_candidate(score) and without.get(score.name) in (None, dataset):
            candidates.append(score)
    return candidates


def _best_references(scores: Sequence[Score], values: Mapping[str, float]) -> dict[str, str]:
    """Return the names of the best single score and of the best baseline, if there are any."""
    best: dict[str, str] = {}
    for score in scores:
        if score.needs.labels or _is_candidate(score):
            continue
        kinds = REFERENCES if score.recipe.family == "baseline" else REFERENCES[:1]
        for kind in kinds:
            if kind not in best or values[score.name] > values[best[kind]]:
                best[kind] = score.name
    return best


def _fitted_on(score: FittedScore, without: str | None) -> str:
    """Return a description of the data that the score was fitted on."""
    needs = score.fit_needs
    if needs.ood:
        return "all sets" if without is None else "the other sets"
    return "labels" if needs.labels else "ID samples"


def _rows_of(results: pa.Table, roles: Mapping[str, str], task: str, dataset: str) -> pa.Table:
    """Return the rows of one task on one dataset."""
    wanted = [dataset]
    if task != "misclassification":
        wanted += [name for name, role in roles.items() if role == ID]
    return results.filter(pc.is_in(results["dataset"], pa.array(wanted)))


def _compared(
    results: pa.Table,
    candidates: list[str],
    best: Mapping[str, str],
    roles: Mapping[str, str],
    task: str,
    resamples: int,
    seed: int,
) -> dict[str, Record]:
    """Return each candidate's AUROC in a task, and its difference to each of the best references."""
    present = set(pc.unique(results["dataset"]).to_pylist())
    roles = {name: role for name, role in roles.items() if name in present}
    compared: dict[str, Record] = {name: {} for name in candidates}
    for kind, reference in best.items():
        evaluation = evaluate(
            results, [*candidates, reference], roles, baseline=reference, resamples=resamples, seed=seed
        )
        for name in candidates:
            (metric,) = evaluation.find(score=name, task=task, metric="auroc")
            compared[name] |= {"auroc": metric["value"], "low": metric["low"], "high": metric["high"]}
        for comparison in evaluation.comparisons:
            if (comparison["metric"], comparison["task"]) == ("auroc", task):
                compared[comparison["score"]] |= _difference(kind, reference, comparison)
    return compared


def _difference(kind: str, reference: str, comparison: Record) -> Record:
    record = {kind: reference, f"{kind}_auroc": comparison["baseline_value"]}
    for key in ("difference", "low", "high", "verdict"):
        record[f"{kind}_{key}"] = comparison[key]
    return record


NOTES = (
    "AUROC times 100 with its 95 % interval, and the difference to a reference with the paired interval.",
    "The reference is the best on the evaluated rows, which favours it. No score was fitted on a row that it scores.",
)


def fitted_comparison_grids(records: Sequence[Record]) -> list[Grid]:
    """Return one grid per task and dataset.

    Args:
        records: The result of :func:`compare_fitted`.
    """
    records_of_task: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        records_of_task.setdefault((record["task"], record["dataset"], record["group"]), []).append(record)
    grids = []
    for number, ((task, dataset, group), members) in enumerate(records_of_task.items(), 1):
        question = "errors" if task == "misclassification" else group
        grids.append(_grid(f"{question}: {dataset}", members, NOTES if number == len(records_of_task) else ()))
    return grids


def _grid(title: str, records: Sequence[Record], notes: tuple[str, ...]) -> Grid:
    names = Column("score, fitted on", tuple(f"{r['score']}\n  {r['fitted_on']}" for r in records), left=True)
    own = []
    for record in records:
        own.append(f"{100 * record['auroc']:.1f}\n{_interval(record['low'], record['high'])}")
    groups = [Group("", (Column("AUROC", tuple(own)),))]
    for kind in REFERENCES:
        if kind in records[0]:
            heading = f"best {kind}\n{records[0][kind]} {100 * records[0][f'{kind}_auroc']:.1f}"
            groups.append(Group("", (Column(heading, tuple(_difference_text(record, kind) for record in records)),)))
    return Grid(title, names, tuple(groups), notes=notes)


def _difference_text(record: Record, kind: str) -> str:
    difference = f"{100 * record[f'{kind}_difference']:+.1f} {record[f'{kind}_verdict']}"
    return f"{difference}\n{_interval(record[f'{kind}_low'], record[f'{kind}_high'], '+')}"


def _interval(low: float | None, high: float | None, sign: str = "") -> str:
    return "" if low is None or high is None else f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"


def write_fitted_comparison(records: Sequence[Record], directory: Path) -> list[Path]:
    """Write the records as ``fitted_comparison.csv`` and ``fitted_comparison.json``.

    Args:
        records: The result of :func:`compare_fitted`.
        directory: The run directory.
    """
    text = json.dumps(list(records), indent=1, allow_nan=False) + "\n"
    table = write_csv(directory / "fitted_comparison.csv", records)
    return [table, write_text(directory / "fitted_comparison.json", text)]
