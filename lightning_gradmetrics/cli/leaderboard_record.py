"""The leaderboard file of a run: the AUROC of every score on every question, and the challengers' paired differences."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_gradmetrics.cli.steps.evaluate import Evaluated
from lightning_gradmetrics.cli.steps.prepare import Experiment
from lightning_gradmetrics.cli.steps.score import Scored
from lightning_gradmetrics.evaluation import Evaluation, evaluate
from lightning_gradmetrics.report.tables.marks import kind_of
from lightning_gradmetrics.report.writing import describe_environment
from lightning_gradmetrics.scores import Score

__all__ = ["areas_of", "differences_of", "leaderboard_record", "shown_command"]

Record = dict[str, Any]

DIGITS = 5
"""Number of decimals in a file."""

UNIT = "auroc"


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


def differences_of(evaluation: Evaluation) -> list[Record]:
    """Return the AUROC of the evaluation's baseline minus that of each other score, with the interval, by column."""
    by_place: dict[tuple[str, str], Record] = {}
    for entry in evaluation.comparisons:
        score_and_column = (entry["score"], column_of(entry))
        if entry["metric"] != UNIT or (score_and_column in by_place and entry["dataset"] is not None):
            continue
        low, high = entry["low"], entry["high"]
        ends = (None, None) if low is None else (-high, -low)
        by_place[score_and_column] = {
            "challenger": entry["baseline"],
            "against": entry["score"],
            "column": score_and_column[1],
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
    comparisons: list[Record] = []
    for challenger in challengers if settings.resamples else []:
        comparisons += differences_of(_compared(experiment, scored, evaluated.detectors, challenger))
    return {
        "title": options.get("title") or experiment.description["name"],
        "notes": list(options.get("notes") or []),
        "originals": dict(options.get("originals") or {}),
        "model": {key: experiment.description[key] for key in ("name", "checkpoint", "parameters", "classes")},
        "datasets": _datasets(evaluated.evaluation),
        "fitted_on": _fitted_on(experiment),
        "resamples": settings.resamples,
        "seed": settings.seed,
        "command": shown_command(sys.argv[1:]),
        "environment": describe_environment(),
        "rows": [_row(evaluated.evaluation, score) for score in evaluated.detectors],
        "comparisons": comparisons,
    }


def shown_command(arguments: Sequence[str]) -> str:
    """Return the command as it is published: absolute paths become ``PATH``, and Hydra's settings are left out.

    Example:
        >>> shown_command(["experiment=leaderboard", "root=/home/me/data", "hydra.run.dir=out"])
        'gradmetrics experiment=leaderboard root=PATH'
    """
    shown = ["gradmetrics"]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not key.startswith("hydra"):
            shown.append(f"{key}=PATH" if equals and Path(value).is_absolute() else argument)
    return shlex.join(shown)


def _compared(experiment: Experiment, scored: Scored, scores: Sequence[Score], challenger: str) -> Evaluation:
    """Evaluate all scores against a challenger."""
    settings, present = experiment.settings, set(scored.results["dataset"].to_pylist())
    roles = {name: role for name, role in experiment.data.roles.items() if name in present}
    names = [score.name for score in scores]
    return evaluate(scored.results, names, roles, baseline=challenger, resamples=settings.resamples, seed=settings.seed)


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
    return {
        "score": score.name,
        "spelled": score.recipe.name_of(score.arguments),
        "family": score.recipe.family,
        "fit": kind_of(score),
        "forwards": score.needs.forwards,
        "backward": score.needs.backward,
        **areas_of(evaluation, score.name),
    }
