"""The leaderboard file of a run: the AUROC of every score on every question, and the challengers' paired differences."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_gradmetrics.cli.steps.evaluate import Evaluated
from lightning_gradmetrics.cli.steps.prepare import Experiment
from lightning_gradmetrics.cli.steps.score import Scored
from lightning_gradmetrics.evaluation import Evaluation
from lightning_gradmetrics.evaluation.protocol import compare_with_each
from lightning_gradmetrics.report.tables.marks import kind_of
from lightning_gradmetrics.report.writing import describe_environment
from lightning_gradmetrics.results.replacing import write_text
from lightning_gradmetrics.scores import Score

__all__ = [
    "areas_of",
    "base_record",
    "cost_of",
    "differences_of",
    "leaderboard_record",
    "shown_command",
    "write_record",
]

Record = dict[str, Any]

DIGITS = 5
"""Number of decimals in a file."""

UNIT = "auroc"

MODEL_KEYS = ("name", "checkpoint", "parameters", "classes")


def column_of(entry: Mapping[str, Any]) -> str:
    """Return the column of a metric: ``"errors"``, a role such as ``"near"``, or ``"joint near"``.

    Example:
        >>> column_of({"task": "joint", "group": "near"})
        'joint near'
    """
    if entry["task"] == "misclassification":
        return "errors"
    return f"joint {entry['group']}" if entry["task"] == "joint" else str(entry["group"])


def areas_of(evaluation: Evaluation, score: str) -> dict[str, list[float | None]]:
    """Return the AUROC of a score with its interval, by column; for a group of several datasets, the mean."""
    areas: dict[str, list[float | None]] = {}
    for entry in evaluation.find(score=score, metric=UNIT):
        column = column_of(entry)
        if entry["value"] is not None and (column not in areas or entry["dataset"] is None):
            areas[column] = _rounded(entry["value"], entry["low"], entry["high"])
    return areas


def differences_of(comparisons: Sequence[Mapping[str, Any]]) -> list[Record]:
    """Return the AUROC of each baseline of the comparisons minus that of each other score, with the interval, by column."""
    by_place: dict[tuple[str, str, str], Record] = {}
    for entry in comparisons:
        identity = (entry["baseline"], entry["score"], column_of(entry))
        if entry["metric"] != UNIT or (identity in by_place and entry["dataset"] is not None):
            continue
        low, high = entry["low"], entry["high"]
        ends = (None, None) if low is None else (-high, -low)
        by_place[identity] = {
            "challenger": entry["baseline"],
            "against": entry["score"],
            "column": identity[2],
            "difference": _rounded(-entry["difference"], *ends),
        }
    return list(by_place.values())


def _rounded(*values: float | None) -> list[float | None]:
    rounded: list[float | None] = []
    for value in values:
        rounded.append(None if value is None else round(value, DIGITS))
    return rounded


def leaderboard_record(experiment: Experiment, scored: Scored, evaluated: Evaluated) -> Record:
    """Return the content of a run's leaderboard file.

    Args:
        experiment: The run; its settings have the title and the challengers.
        scored: Its results.
        evaluated: Its metrics.

    Raises:
        ValueError: If a challenger is not among the scores.
    """
    settings = experiment.settings
    options = settings.leaderboard or {}
    names = [score.name for score in evaluated.detectors]
    challengers = list(options.get("challengers") or [])
    unknown = sorted(set(challengers) - set(names))
    if unknown:
        raise ValueError(
            f"leaderboard.challengers names {', '.join(unknown)}; allowed are the scores {', '.join(names)}"
        )
    comparisons = []
    if challengers and settings.resamples:
        comparisons = differences_of(_compared(experiment, scored, names, challengers))
    record = base_record(options, {key: experiment.description[key] for key in MODEL_KEYS})
    return {
        **record,
        "originals": dict(options.get("originals") or {}),
        "datasets": _datasets(evaluated.evaluation),
        "fitted_on": _fitted_on(experiment),
        "resamples": settings.resamples,
        "seed": settings.seed,
        "rows": [_row(evaluated.evaluation, score) for score in evaluated.detectors],
        "comparisons": comparisons,
    }


def base_record(options: Mapping[str, Any], model: Mapping[str, Any]) -> Record:
    """Return what the files of all kinds of runs have: title, notes, model, command and environment.

    Args:
        options: The settings of ``leaderboard``: ``title`` and ``notes``.
        model: The model; its ``name`` is the title if there is none.
    """
    return {
        "title": options.get("title") or model["name"],
        "notes": list(options.get("notes") or []),
        "model": dict(model),
        "fitted_on": {},
        "command": shown_command(sys.argv[1:]),
        "environment": describe_environment(),
        "comparisons": [],
    }


def write_record(record: Record, directory: Path) -> None:
    """Write a leaderboard file to a run directory."""
    write_text(directory / "leaderboard.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def shown_command(arguments: Sequence[str]) -> str:
    """Return the published form of the command: absolute paths become ``PATH``; Hydra's settings and the title are left out.

    Example:
        >>> shown_command(["experiment=leaderboard", "root=/home/me/data", "hydra.run.dir=out"])
        'gradmetrics experiment=leaderboard root=PATH'
    """
    shown = ["gradmetrics"]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not key.startswith(("hydra", "leaderboard")):
            shown.append(f"{key}=PATH" if equals and Path(value).is_absolute() else argument)
    return shlex.join(shown)


def _compared(experiment: Experiment, scored: Scored, names: Sequence[str], challengers: Sequence[str]) -> list[Record]:
    """Compare all scores with each challenger."""
    settings, present = experiment.settings, set(scored.results["dataset"].to_pylist())
    roles = {name: role for name, role in experiment.data.roles.items() if name in present}
    return compare_with_each(
        scored.results, names, roles, challengers, resamples=settings.resamples, seed=settings.seed
    )


def _datasets(evaluation: Evaluation) -> list[Record]:
    summaries = []
    for dataset in evaluation.datasets:
        summaries.append({key: dataset[key] for key in ("name", "role", "rows", "accuracy")})
    return summaries


def _fitted_on(experiment: Experiment) -> dict[str, int]:
    """Return the number of samples of each in-distribution dataset that scores are fitted on."""
    sizes = {}
    for name, data in experiment.data.fit.items():
        if experiment.data.fit_roles.get(name, "id") == "id":
            sizes[name] = len(data)  # type: ignore[arg-type]
    return sizes


def _row(evaluation: Evaluation, score: Score) -> Record:
    return {**cost_of(score), "fit": kind_of(score), **areas_of(evaluation, score.name)}


def cost_of(score: Score) -> Record:
    """Return the name of a score, its family and what it costs."""
    return {
        "score": score.name,
        "spelled": score.recipe.name_of(score.arguments),
        "family": score.recipe.family,
        "forwards": score.needs.forwards,
        "backward": score.needs.backward,
    }
