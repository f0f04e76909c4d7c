"""The leaderboard page: one JSON file per run, rendered as Markdown.

``python -m lightning_gradmetrics.cli.leaderboard docs/leaderboard`` writes ``docs/leaderboard.md`` from the files in the folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["page", "section"]

COLUMNS = {
    "errors": "errors",
    "near": "near",
    "far": "far",
    "joint near": "joint near",
    "joint far": "joint far",
}
"""The columns of AUROC, by their key in a file."""


def _cell(value: Sequence[float]) -> str:
    area, low, high = value
    return f"{100 * area:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def section(run: Mapping[str, Any]) -> list[str]:
    """Return the lines of one run: its title, its notes and its table.

    Args:
        run: ``title``, ``notes`` (paragraphs) and ``rows``; each row has ``score``, ``forwards``, ``fit``, and for each
            column the AUROC with the ends of its interval.

    Example:
        >>> row = {"score": "energy", "forwards": 1, "fit": "", "errors": [0.86, 0.85, 0.87]}
        >>> section({"title": "A run", "notes": [], "rows": [row]})[-1]
        '| `energy` | 1 |  | 86.0 (85.0–87.0) | – | – | – | – |'
    """
    lines = [f"## {run['title']}", ""]
    for note in run["notes"]:
        lines += [note, ""]
    lines.append(f"| score | forwards | fitted on | {' | '.join(COLUMNS.values())} |")
    lines.append("| --- | --- | --- |" + " --- |" * len(COLUMNS))
    for row in run["rows"]:
        cells = []
        for key in COLUMNS:
            cells.append(_cell(row[key]) if key in row else "–")
        lines.append(f"| `{row['score']}` | {row['forwards']} | {row['fit']} | {' | '.join(cells)} |")
    return lines


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of several runs as Markdown.

    Args:
        runs: What the files contain, as for :func:`section`.
    """
    lines = [
        "# Leaderboard",
        "",
        "Which scores find errors, out-of-distribution data, or both (*joint*: correct predictions against errors and OOD "
        "data, half of the mixture OOD). AUROC × 100 with 95 % intervals; *forwards* counts the forward passes, the one that "
        "makes the prediction included. The page is rendered from one JSON file per run by "
        "`python -m lightning_gradmetrics.cli.leaderboard`.",
        "",
    ]
    for run in runs:
        lines += [*section(run), ""]
    return "\n".join(lines)


def main(folder: Path) -> None:
    """Write the page beside the folder."""
    runs = []
    for path in sorted(folder.glob("*.json")):
        runs.append(json.loads(path.read_text()))
    folder.with_suffix(".md").write_text(page(runs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
