"""Scores whose arguments differ between runs: each setting becomes a score, so that no mean mixes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["with_settings"]

Row = Mapping[str, str]
Arguments = dict[str, Any]


def with_settings(runs: Mapping[Path, Sequence[Row]]) -> dict[Path, list[Row]]:
    """Return the rows of each run, with the arguments that differ between the runs in the names of the scores.

    Args:
        runs: The rows of ``metrics.csv`` by run directory; ``metrics.json`` beside it has the arguments.
    """
    arguments = {folder: _arguments(folder) for folder in runs}
    differing = _differing(list(arguments.values()))
    named = {}
    for folder, rows in runs.items():
        names = {}
        for score, given in arguments[folder].items():
            chosen = [f"{key}={given.get(key)}" for key in differing[score]]
            names[score] = f"{score}({','.join(chosen)})" if chosen else score
        named[folder] = [{**row, "score": names.get(row["score"], row["score"])} for row in rows]
    return named


def _arguments(folder: Path) -> dict[str, Arguments]:
    """Return the arguments of each score of a run; empty if the run has no ``metrics.json``."""
    path = folder / "metrics.json"
    if not path.is_file():
        return {}
    scores = json.loads(path.read_text(encoding="utf-8")).get("scores", [])
    return {score["name"]: dict(score.get("arguments") or {}) for score in scores}


def _differing(runs: Sequence[Mapping[str, Arguments]]) -> dict[str, list[str]]:
    """Return the names of the arguments of each score that do not have one value in all runs."""
    values: dict[str, dict[str, set[str]]] = {}
    for run in runs:
        for score, arguments in run.items():
            for key, value in arguments.items():
                values.setdefault(score, {}).setdefault(key, set()).add(json.dumps(value, sort_keys=True))
    differing: dict[str, list[str]] = {}
    for run in runs:
        for score in run:
            differing[score] = [key for key, seen in values.get(score, {}).items() if len(seen) > 1]
    return differing
