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
    arguments = dict(zip(runs, map(_arguments, runs), strict=True))
    differing = _differing(list(arguments.values()))
    named: dict[Path, list[Row]] = {}
    for folder, rows in runs.items():
        named[folder] = []
        for row in rows:
            score = row["score"]
            name = _name(score, arguments[folder].get(score, {}), differing)
            named[folder].append({**row, "score": name})
    return named


def _name(score: str, arguments: Arguments, differing: Mapping[str, Sequence[str]]) -> str:
    """Return the name of a score with those of its arguments that differ between the runs."""
    chosen = []
    for key in differing.get(score, ()):
        chosen.append(f"{key}={arguments.get(key)}")
    return f"{score}({','.join(chosen)})" if chosen else score


def _arguments(folder: Path) -> dict[str, Arguments]:
    """Return the arguments of each score of a run; empty if the run has no ``metrics.json``."""
    path = folder / "metrics.json"
    if not path.is_file():
        return {}
    arguments = {}
    for score in json.loads(path.read_text(encoding="utf-8")).get("scores", []):
        arguments[score["name"]] = dict(score.get("arguments") or {})
    return arguments


def _differing(runs: Sequence[Mapping[str, Arguments]]) -> dict[str, list[str]]:
    """Return the names of the arguments of each score that do not have one value in all runs."""
    values: dict[str, dict[str, set[str]]] = {}
    for run in runs:
        for score, arguments in run.items():
            for key, value in arguments.items():
                if key != "seed":  # runs with other seeds are repetitions: their mean is wanted
                    values.setdefault(score, {}).setdefault(key, set()).add(json.dumps(value, sort_keys=True))
    differing: dict[str, list[str]] = {}
    for score, by_key in values.items():
        for key, distinct in by_key.items():
            if len(distinct) > 1:
                differing.setdefault(score, []).append(key)
    return differing
