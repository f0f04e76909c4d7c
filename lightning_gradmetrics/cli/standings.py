"""Where scores stand that learn from many features: against the best single score and baseline, by paired intervals."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.table import Table

from lightning_gradmetrics.evaluation import evaluate
from lightning_gradmetrics.evaluation.tasks import ID
from lightning_gradmetrics.scores import FittedScore, Score

__all__ = ["standings", "standings_table", "write_standings"]

RIVALS = ("single", "baseline")
"""Of which the best is compared with: all scores that are no candidates, and those of them that take no gradient."""

Record = dict[str, Any]


def standings(
    results: pa.Table,
    scores: Sequence[Score],
    roles: Mapping[str, str],
    without: Mapping[str, str | None],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Record]:
    """AUROC of every candidate, and its differences to the best single score and to the best baseline.

    Candidates are the scores made of ``combination``, and all that learn from labels or from out-of-distribution
    samples; every other score is a single one, but for those that look at the label of the row they score. The best
    single score is the one with the largest AUROC on the very rows that are judged, which favours it: a candidate that
    is better than that one is better than the single score that anybody would have chosen beforehand. Intervals are
    those of :func:`lightning_gradmetrics.evaluation.evaluate`: they hold the variation of the rows, not that of the
    fits, and are not corrected for the number of candidates.

    Args:
        results: Per-sample results, of scores whose fits did not see the row.
        scores: The scores of its columns.
        roles: The role of each data set.
        without: For a column, the data set that none of its fits saw: it is judged on that set alone.
        resamples: Bootstrap resamples.
        seed: Of the resamples.

    Returns:
        One dict a task, data set and candidate: ``task``, ``dataset``, ``group`` (its role), ``score``, ``fitted_on``,
        ``auroc``, ``low``, ``high``; for ``single`` and ``baseline`` the best one's name, as ``single``, and
        ``single_auroc``, ``single_difference``, ``single_low``, ``single_high`` and ``single_verdict`` (``better``,
        ``worse`` or ``cannot tell``), which are missing without resamples.
    """
    values = evaluate(results, [score.name for score in scores], roles, resamples=0).find(metric="auroc")
    candidates, names = [s for s in scores if isinstance(s, FittedScore) and _is_candidate(s)], _rivals(scores)
    records = []
    for place in (v for v in values if v["score"] == scores[0].name and v["dataset"] and v["value"] is not None):
        where = {key: place[key] for key in ("task", "dataset", "group")}
        known = {v["score"]: v["value"] for v in values if where.items() <= v.items()}
        best = {kind: max(members, key=lambda name: known[name]) for kind, members in names.items() if members}
        entrants = [c for c in candidates if without.get(c.name) in (None, place["dataset"])]
        rows = _rows(results, roles, place["task"], place["dataset"])
        judged = _judged(rows, [c.name for c in entrants], best, roles, place["task"], resamples, seed)
        for c in entrants:
            records.append(
                {**where, "score": c.name, "fitted_on": _fitted_on(c, without.get(c.name)), **judged[c.name]}
            )
    return records


def _is_candidate(score: FittedScore) -> bool:
    needs = score.fit_needs
    return score.recipe.name == "combination" or needs.labels or needs.ood


def _rivals(scores: Sequence[Score]) -> dict[str, list[str]]:
    """The names of the scores that candidates are compared with."""
    singles = [s for s in scores if not (s.needs.labels or (isinstance(s, FittedScore) and _is_candidate(s)))]
    baselines = [score for score in singles if score.recipe.family == "baseline"]
    return dict(zip(RIVALS, ([score.name for score in group] for group in (singles, baselines)), strict=True))


def _fitted_on(score: FittedScore, without: str | None) -> str:
    """What entered its fits, in words."""
    needs = score.fit_needs
    if needs.ood:
        return "every set, this one too" if without is None else "the other sets"
    return "labels" if needs.labels else "in-distribution data"


def _rows(results: pa.Table, roles: Mapping[str, str], task: str, dataset: str) -> pa.Table:
    """The rows that a question is judged on."""
    inside = [name for name, role in roles.items() if role == ID]
    wanted = [dataset] if task == "misclassification" else [*inside, dataset]
    return results.filter(pc.is_in(results["dataset"], pa.array(wanted)))


def _judged(
    results: pa.Table,
    entrants: list[str],
    best: Mapping[str, str],
    roles: Mapping[str, str],
    task: str,
    resamples: int,
    seed: int,
) -> dict[str, Record]:
    """Of each entrant its AUROC in a task, and its difference to each of the best."""
    present = set(pc.unique(results["dataset"]).to_pylist())
    here = {name: role for name, role in roles.items() if name in present}
    found: dict[str, Record] = {name: {} for name in entrants}
    for kind, rival in best.items():
        evaluation = evaluate(results, [*entrants, rival], here, [rival], resamples=resamples, seed=seed)
        for record in (r for r in evaluation.find(metric="auroc", task=task) if r["score"] != rival):
            found[record["score"]] |= {"auroc": record["value"], "low": record["low"], "high": record["high"]}
        for c in (c for c in evaluation.comparisons if (c["metric"], c["task"]) == ("auroc", task)):
            numbers = {
                "auroc": c["baseline_value"],
                **{key: c[key] for key in ("difference", "low", "high", "verdict")},
            }
            found[c["score"]] |= {kind: rival, **{f"{kind}_{key}": value for key, value in numbers.items()}}
    return found


CAPTION = (
    "AUROC times 100 and its 95 % interval; below a rival, the candidate's difference to it with the paired interval. "
    "The rival is the best on the rows that are judged, which favours the rival. No fit saw the rows that it scores."
)


def standings_table(records: Sequence[Record]) -> Table:
    """The records for the terminal; 80 columns do."""
    table = Table(title="Fitted on many features, against the best single score", title_justify="left", caption=CAPTION)
    table.box, table.pad_edge, table.caption_justify = box.SIMPLE_HEAD, False, "left"
    table.add_column("score, and what it is fitted on", overflow="fold")
    for heading in ("AUROC", "best single", "best baseline"):
        table.add_column(heading, justify="right", no_wrap=True)
    places = list(dict.fromkeys((r["task"], r["dataset"], r["group"]) for r in records))
    for task, dataset, group in places:
        table.add_row(f"[bold]{'errors' if task == 'misclassification' else group}: {dataset}[/bold]")
        members = [r for r in records if (r["task"], r["dataset"]) == (task, dataset)]
        for number, record in enumerate(members, 1):
            own = f"{100 * record['auroc']:.1f}\n{_interval(record['low'], record['high'])}"
            cells = [_rival(record, kind) for kind in RIVALS]
            name = f"{record['score']}\n  {record['fitted_on']}"
            table.add_row(name, own, *cells, end_section=number == len(members))
    return table


def _rival(record: Record, kind: str) -> str:
    if kind not in record:
        return "–"
    difference = f"{100 * record[f'{kind}_difference']:+.1f} {record[f'{kind}_verdict']}"
    interval = _interval(record[f"{kind}_low"], record[f"{kind}_high"], "+")
    return f"{record[kind]} {100 * record[f'{kind}_auroc']:.1f}\n{difference}\n{interval}"


def _interval(low: float | None, high: float | None, sign: str = "") -> str:
    return "" if low is None or high is None else f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"


def write_standings(records: Sequence[Record], directory: Path) -> list[Path]:
    """The records as ``combination.csv`` and ``combination.json``.

    Args:
        records: Of :func:`standings`.
        directory: The run directory.
    """
    table, text = directory / "combination.csv", directory / "combination.json"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for record in records for key in record)))
        writer.writeheader()
        writer.writerows(records)
    text.write_text(json.dumps(list(records), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return [table, text]
