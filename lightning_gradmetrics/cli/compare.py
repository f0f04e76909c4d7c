"""Compares several runs in one table: every metric with its mean and standard deviation over the runs."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from rich.console import Console

from lightning_gradmetrics.cli.errors import UsageError
from lightning_gradmetrics.cli.files import shown_path
from lightning_gradmetrics.cli.progress import notice
from lightning_gradmetrics.cli.score_settings import with_settings
from lightning_gradmetrics.report.comparison import write_comparison
from lightning_gradmetrics.report.tables.documents import latex, markdown
from lightning_gradmetrics.report.tables.grid import Column, Grid, Group
from lightning_gradmetrics.report.tables.terminal import print_grid
from lightning_gradmetrics.results.replacing import write_csv, write_text

__all__ = ["comparison_grid", "main", "read_runs", "summary_rows"]

USAGE = "usage: gradmetrics compare DIR DIR [DIR ...] [--output DIR], where each DIR is a run or contains runs"
KEYS = ("score", "task", "group", "dataset", "metric")
"""The columns that identify a number in ``metrics.csv``."""

BRACKETS = "A number in brackets is the number of runs that have the score, if not all."

Key = tuple[str, ...]
Row = Mapping[str, str]


def main(arguments: Sequence[str]) -> None:
    """Compare runs: print one table and write ``comparison.html``, ``.csv``, ``.md`` and ``.tex``.

    Args:
        arguments: Run directories, or directories that contain them, and ``--output DIR``.

    Raises:
        UsageError: If there are fewer than two runs, or a directory contains no run.
    """
    folders, output = _parsed(arguments)
    runs = read_runs(folders)
    rows = summary_rows(list(runs.values()))
    grid = comparison_grid(rows, len(runs))
    console = Console()
    print_grid(console, _fitting(grid, console.width))
    write_csv(output / "comparison.csv", rows)
    write_text(output / "comparison.md", markdown(grid))
    write_text(output / "comparison.tex", latex(grid))
    names = _names_of(list(runs))
    page, notes = {}, {}
    for folder, run in runs.items():
        page[names[folder]], notes[names[folder]] = run, _overrides(folder)
    write_comparison(page, output / "comparison.html", notes)
    notice(f"Comparison of {len(runs)} runs: {shown_path(output.resolve())}/comparison.html, .csv, .md, .tex")


def _names_of(folders: Sequence[Path]) -> dict[Path, str]:
    """Return a name for each run: the last parts of its path, at least two, and enough to make all names differ."""
    names: dict[Path, str] = {}
    for parts in range(2, 20):
        for folder in folders:
            names[folder] = "/".join(folder.resolve().parts[-parts:])
        if len(set(names.values())) == len(folders):
            break
    return names


def _overrides(folder: Path) -> str:
    """Return the overrides of a run of the command, or an empty string."""
    path = folder / ".hydra" / "overrides.yaml"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return " ".join(map(str, yaml.safe_load(text) or []))


def _parsed(arguments: Sequence[str]) -> tuple[list[Path], Path]:
    folders, output, rest = [], Path(), list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--output" and rest:
            output = Path(rest.pop(0))
        elif argument.startswith("-"):
            raise UsageError(USAGE)
        else:
            folders.append(Path(argument))
    if not folders:
        raise UsageError(USAGE)
    return folders, output


def read_runs(folders: Sequence[Path]) -> dict[Path, list[Row]]:
    """Return the rows of ``metrics.csv`` of every run, by its directory.

    A score whose arguments differ between the runs has them in its name.

    Args:
        folders: Run directories, or directories that contain run directories, such as those of a sweep. Files with other
            columns are left out with a notice: Lightning's ``CSVLogger`` writes a ``metrics.csv`` too.

    Raises:
        UsageError: If a directory contains no run, or there are fewer than two runs.
    """
    runs: dict[Path, list[Row]] = {}
    for folder in folders:
        found = False
        for file in sorted(folder.rglob("metrics.csv")):
            with file.open(newline="", encoding="utf-8") as lines:
                reader = csv.DictReader(lines)
                if {*KEYS, "fit", "value"} <= set(reader.fieldnames or ()):
                    runs[file.parent], found = list(reader), True
                else:
                    notice(f"left out, because it is not the metrics.csv of a run: {shown_path(file)}")
        if not found:
            raise UsageError(f"no run in {str(folder)!r}: a run directory contains metrics.csv")
    if len(runs) < 2:
        raise UsageError(f"found {len(runs)} run, but a comparison needs at least 2; {USAGE}")
    return with_settings(runs)


def summary_rows(runs: Sequence[Sequence[Row]]) -> list[dict[str, object]]:
    """Return one row per metric: its mean, standard deviation, minimum and maximum over the runs that have it.

    Args:
        runs: The rows of each run's ``metrics.csv``.

    Returns:
        ``score``, ``fit``, ``task``, ``group``, ``dataset``, ``metric``, ``runs`` (how many have it), ``mean``, ``std``
        (of the sample; empty for one run), ``least`` and ``most``.
    """
    values: dict[Key, list[float]] = {}
    fits: dict[Key, str] = {}
    for run in runs:
        for row in run:
            key = tuple(row[name] for name in KEYS)
            fits[key] = row["fit"]
            values.setdefault(key, []).extend([float(row["value"])] if row["value"] else [])
    rows: list[dict[str, object]] = []
    for key, numbers in values.items():
        summary: dict[str, object] = {**dict(zip(KEYS, key, strict=True)), "fit": fits[key], "runs": len(numbers)}
        if numbers:
            summary |= {"mean": statistics.fmean(numbers), "least": min(numbers), "most": max(numbers)}
        if len(numbers) > 1:
            summary["std"] = statistics.stdev(numbers)
        rows.append(summary)
    return rows


def comparison_grid(rows: Sequence[Mapping[str, object]], runs: int) -> Grid:
    """Return the table of AUROCs: mean ± standard deviation over the runs, one column per dataset and group mean.

    Args:
        rows: The result of :func:`summary_rows`.
        runs: The number of runs.
    """
    cells: dict[tuple[str, str], dict[str, str]] = {}
    best: dict[tuple[str, str], float] = {}
    names: dict[str, None] = {}
    for row in rows:
        names[str(row["score"])] = None
        if row["metric"] != "auroc" or row["task"] == "joint" or "mean" not in row:
            continue
        question = "errors" if row["task"] == "misclassification" else str(row["group"])
        question_and_dataset = (question, str(row["dataset"]) or "mean")
        cells.setdefault(question_and_dataset, {})[str(row["score"])] = _text(row, runs)
        best[question_and_dataset] = max(best.get(question_and_dataset, 0.0), float(str(row["mean"])))
    groups: dict[str, list[Column]] = {}
    for (question, dataset), texts in sorted(cells.items(), key=lambda item: _order(item[0])):
        column_cells = tuple(texts.get(name, "–") for name in names)
        start = f"{100 * best[question, dataset]:.1f}"
        rows_in_bold = frozenset(number for number, cell in enumerate(column_cells) if cell.split(" ")[0] == start)
        groups.setdefault(question, []).append(Column(dataset, column_cells, rows_in_bold))
    is_partial = any(row["runs"] != runs for row in rows)
    return Grid(
        title=f"AUROC times 100: mean ± standard deviation over {runs} runs",
        names=Column("score", tuple(names), left=True),
        groups=tuple(Group(question, tuple(columns)) for question, columns in groups.items()),
        notes=("Bold: the largest mean.", *([BRACKETS] if is_partial else [])),
    )


def _order(place: tuple[str, str]) -> tuple[bool, bool]:
    """Return a sort key: errors come first, and means after the datasets of their group."""
    question, dataset = place
    return question != "errors", dataset == "mean"


def _text(row: Mapping[str, object], runs: int) -> str:
    text = f"{100 * float(str(row['mean'])):.1f}"
    if "std" in row:
        text += f" ± {100 * float(str(row['std'])):.1f}"
    return text if row["runs"] == runs else f"{text} ({row['runs']})"


def _fitting(grid: Grid, width: int) -> Grid:
    """Return the grid without its last columns if it is too wide; a note names the files that contain them."""
    left_out = 0
    while grid.width > width and len(grid.columns) > 1:
        left_out += 1
        *groups, last = grid.groups
        shortened = [replace(last, columns=last.columns[:-1])] if len(last.columns) > 1 else []
        grid = replace(grid, groups=(*groups, *shortened))
    if not left_out:
        return grid
    return replace(grid, notes=(*grid.notes, f"{left_out} more columns in comparison.md and comparison.csv."))
