"""Renders the leaderboard page from one JSON file per run.

``python -m lightning_gradmetrics.cli.leaderboard docs/leaderboard`` writes ``docs/leaderboard.md`` from the files in the folder.
A run with ``experiment=leaderboard`` writes its file ``leaderboard.json`` to the run directory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_gradmetrics.report.wording import percent

__all__ = ["conclusions", "page", "section", "standing"]

Run = Mapping[str, Any]
Row = Mapping[str, Any]

COLUMNS = ("errors", "near", "far", "joint near", "joint far")
"""The columns of AUROC, by their key in a file."""

SINGLE_PASS, SAME_PASSES = "single-pass baseline", "baseline with as many forward passes"


def _cell(area: Sequence[float | None] | None) -> str:
    if area is None or area[0] is None:
        return "–"
    return f"{100 * area[0]:.1f}{_interval(area, 1)}"


def _interval(values: Sequence[float | None], digits: int) -> str:
    _, low, high = values
    if low is None or high is None:
        return ""
    return f" ({percent(low, digits)} to {percent(high, digits)})"


def _is_variant(row: Row) -> bool:
    """Return whether a row is trust or one of its variants, which do not count as baselines."""
    return str(row["spelled"]).startswith("trust")


def rivals(run: Run, challenger: str, same_cost: bool) -> list[Row]:
    """Return the baselines for a challenger: those with one forward pass, or those with as many passes as it takes."""
    rows = {row["score"]: row for row in run["rows"]}
    forwards = rows[challenger]["forwards"] if same_cost else 1
    chosen = []
    for row in run["rows"]:
        if not _is_variant(row) and row["family"] == "baseline" and row["forwards"] == forwards:
            chosen.append(row)
    return chosen


def standing(run: Run, challenger: str, column: str, same_cost: bool) -> tuple[str, list[float | None], str] | None:
    """Return a challenger's best rival on a column, the difference with its interval, and a verdict.

    Args:
        run: The content of a file.
        challenger: The score.
        column: The column.
        same_cost: Whether to compare with baselines of as many forward passes, instead of those with one.

    Returns:
        The verdict is ``"above all"`` if every interval against a rival is above 0, ``"above"``, ``"below"`` or
        ``"not distinguishable"`` by the interval against the best rival; ``None`` if there is no rival.
    """
    known = {}
    for entry in run["comparisons"]:
        if entry["challenger"] == challenger and entry["column"] == column:
            known[entry["against"]] = entry["difference"]
    usable = [row for row in rivals(run, challenger, same_cost) if row["score"] in known and column in row]
    if not usable:
        return None
    best = max(usable, key=lambda row: row[column][0])
    difference = known[best["score"]]
    if difference[1] is None:
        return best["spelled"], difference, "not distinguishable"
    if all(known[row["score"]][1] > 0 for row in usable):
        return best["spelled"], difference, "above all"
    if difference[1] > 0:
        return best["spelled"], difference, "above"
    return best["spelled"], difference, "below" if difference[2] < 0 else "not distinguishable"


def conclusions(run: Run) -> list[str]:
    """Return one sentence per challenger and kind of rival, based on the intervals only, and the table of differences."""
    sentences, table = [], []
    for challenger in dict.fromkeys(entry["challenger"] for entry in run["comparisons"]):
        row = next(row for row in run["rows"] if row["score"] == challenger)
        for same_cost in (False, True) if row["forwards"] != 1 else (False,):
            group = SAME_PASSES if same_cost else SINGLE_PASS
            cells: list[str] = []
            verdicts: dict[str, list[str]] = {}
            for column in COLUMNS:
                comparison = standing(run, challenger, column, same_cost)
                if comparison is None:
                    cells.append("–")
                    continue
                rival, difference, verdict = comparison
                verdicts.setdefault(verdict, []).append(column)
                value = percent(difference[0] or 0.0, 2)
                signed = value if value.startswith("−") else f"+{value}"
                cells.append(f"{signed}{_interval(difference, 2)} `{rival}`")
            equal = "equal" if row["forwards"] == 1 or same_cost else "not equal"
            table.append(f"| `{row['spelled']}` | {group} | {equal} | {' | '.join(cells)} |")
            sentences.append(_sentence(row["spelled"], group, verdicts))
    if not table:
        return []
    head = [
        f"| score | against the best | cost | {' | '.join(COLUMNS)} |",
        "| --- | --- | --- |" + " --- |" * len(COLUMNS),
    ]
    return [*sentences, "", "Differences in AUROC points with 95 % paired intervals:", "", *head, *table]


def _sentence(challenger: str, group: str, verdicts: Mapping[str, Sequence[str]]) -> str:
    phrases = {
        "above all": f"above every {group} on",
        "above": f"above the best {group}, but not clearly above every one, on",
        "not distinguishable": f"not distinguishable from the best {group} on",
        "below": f"below the best {group} on",
    }
    parts = []
    for verdict, phrase in phrases.items():
        if verdict in verdicts:
            parts.append(f"{phrase} {', '.join(verdicts[verdict])}")
    return f"- `{challenger}` is {'; '.join(parts)}."


def ablation(run: Run) -> list[str]:
    """Return the table of the differences between the variants of trust and trust, with intervals."""
    variants = {row["score"]: row["spelled"] for row in run["rows"] if "distance=" in str(row["spelled"])}
    lines = []
    for name, spelled in variants.items():
        cells = []
        for column in COLUMNS:
            matching = [
                c for c in run["comparisons"] if (c["challenger"], c["against"], c["column"]) == ("trust", name, column)
            ]
            cells.append(_negated(matching[0]["difference"]) if matching else "–")
        lines.append(f"| `{spelled}` | {' | '.join(cells)} |")
    if not lines:
        return []
    head = [f"| variant minus `trust` | {' | '.join(COLUMNS)} |", "| --- |" + " --- |" * len(COLUMNS)]
    return ["### Do gradient norms help beside activations?", "", *head, *lines, ""]


def _negated(difference: Sequence[float | None]) -> str:
    value, low, high = difference
    text = percent(-(value or 0.0), 2)
    signed = text if text.startswith("−") else f"+{text}"
    return signed if low is None or high is None else f"{signed}{_interval([None, -high, -low], 2)}"


def confound(run: Run) -> list[str]:
    """Return the table of the columns whose datasets were also scored from the original files."""
    originals: Mapping[str, str] = run.get("originals") or {}
    if not originals:
        return []
    heads: list[str] = []
    for column in originals:
        heads += [f"{column}, original files", f"{column}, re-encoded", "change"]
    lines = [f"| score | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    first = next(iter(originals))
    for row in sorted(run["rows"], key=lambda row: row[first][0] - row[originals[first]][0]):
        cells = []
        for column, original in originals.items():
            change = percent(row[column][0] - row[original][0], 1)
            cells += [_cell(row[original]), _cell(row[column]), change if change.startswith("−") else f"+{change}"]
        lines.append(f"| `{row['spelled']}` | {' | '.join(cells)} |")
    return [*lines, ""]


def section(run: Run) -> list[str]:
    """Return the lines of one run: title, data, conclusions, and the table of all scores or of re-encoded files.

    Args:
        run: The content of a file: ``title``, ``datasets``, ``rows``, ``comparisons``; see
            :mod:`~lightning_gradmetrics.cli.leaderboard_record`.

    Example:
        >>> row = {"score": "energy", "spelled": "energy", "family": "baseline", "forwards": 1, "fit": "", "errors": [0.86, 0.85, 0.87]}
        >>> section({"title": "A run", "datasets": [], "fitted_on": {}, "rows": [row], "comparisons": []})[-2]
        '| `energy` | 1 |  | 86.0 (85.0 to 87.0) |'
    """
    lines = [f"## {run['title']}", "", *run.get("notes", []), *([""] if run.get("notes") else []), _data(run), ""]
    if run.get("originals"):
        return [*lines, *confound(run)]
    sentences = conclusions(run)
    lines += [*sentences, ""] if sentences else []
    lines += ablation(run)
    known: set[str] = set().union(*run["rows"])
    columns = [column for column in COLUMNS if column in known]
    lines += [f"| score | forwards | fit | {' | '.join(columns)} |", "| --- | --- | --- |" + " --- |" * len(columns)]
    for row in sorted(run["rows"], key=_rank):
        cells = [_cell(row.get(column)) for column in columns]
        passes = f"{row['forwards'] or 'unknown'}{' + backward' if row.get('backward') else ''}"
        lines.append(f"| `{row['spelled']}` | {passes} | {row['fit']} | {' | '.join(cells)} |")
    return [*lines, ""]


def _rank(row: Row) -> float:
    area = row.get("joint near") or row.get("errors") or row.get("near") or [0.0]
    return -float(area[0] or 0.0)


def _data(run: Run) -> str:
    """Return a sentence about the data and the command."""
    parts = []
    for dataset in run["datasets"]:
        unit = dataset.get("unit", "samples")
        accuracy = f", accuracy {100 * dataset['accuracy']:.1f} %" if dataset["accuracy"] is not None else ""
        parts.append(f"{dataset['name']} ({dataset['role']}, {dataset['rows']} {unit}{accuracy})")
    fitted = " and ".join(f"{count} samples of {name}" for name, count in run["fitted_on"].items())
    words = f"Data: {', '.join(parts)}." if parts else ""
    words += f" Fitted scores were fitted on {fitted}." if fitted else ""
    return f"{words} Command: `{run['command']}`." if run.get("command") else words


def page(runs: Sequence[Run]) -> str:
    """Return the page of several runs as Markdown.

    Args:
        runs: The contents of the files, as for :func:`section`.
    """
    lines = [
        "# Leaderboard",
        "",
        "Which scores find errors, out-of-distribution data, or both (*joint*: correct predictions against errors and OOD "
        "data, half of the mixture OOD). AUROC × 100 with 95 % intervals. *forwards* counts the forward passes, the one that "
        "makes the prediction included: scores with different numbers are not compared at equal cost. The sentences below "
        "follow from the paired intervals alone. These cover the choice of test samples, but not other training runs.",
        "",
        "`gradmetrics experiment=leaderboard root=PATH` and `gradmetrics experiment=leaderboard_digits` write `leaderboard.json`, "
        "and so does any other experiment with `'leaderboard={title: NAME}'`, such as `stories` and `camvid`. "
        "`python -m lightning_gradmetrics.cli.leaderboard docs/leaderboard` renders this page from the files in that folder.",
        "",
    ]
    for run in runs:
        lines += section(run)
    return "\n".join(lines)


def main(folder: Path) -> None:
    """Write the page next to the folder."""
    runs = []
    for path in sorted(folder.glob("*.json")):
        runs.append(json.loads(path.read_text(encoding="utf-8")))
    folder.with_suffix(".md").write_text(page(runs), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
