"""Writes the files of a run: ``results.parquet``, ``metrics.json``, and the metrics as CSV, Markdown and LaTeX tables."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_gradmetrics.evaluation import Evaluation, Thresholds
from lightning_gradmetrics.evaluation.thresholds import count_accepted
from lightning_gradmetrics.report.run import METRICS_FILE, RESULTS_FILE, VERSION
from lightning_gradmetrics.report.tables.documents import latex, markdown
from lightning_gradmetrics.report.tables.marks import kind_of
from lightning_gradmetrics.report.tables.metrics import metrics_grid, notes_of
from lightning_gradmetrics.results.replacing import replaced, write_csv, write_text
from lightning_gradmetrics.scores import Score

__all__ = ["describe_environment", "write_metrics_tables", "write_run"]

PACKAGES = ("lightning-gradmetrics", "torch", "lightning", "torchmetrics", "hydra-core", "numpy", "pyarrow")


def write_metrics_tables(evaluation: Evaluation, scores: Sequence[Score], directory: Path) -> list[Path]:
    """Write ``metrics.csv``, one row per number, and the main table as ``table.md`` and ``table.tex``.

    Args:
        evaluation: The evaluation.
        scores: The scores that were evaluated.
        directory: The run directory.
    """
    rows = []
    for score in scores:
        for metric in evaluation.metrics:
            if metric["score"] == score.name:
                rows.append({"score": score.name, "family": score.recipe.family, "fit": kind_of(score), **metric})
    columns = ("score", "family", "fit", "task", "dataset", "group", "metric", "value", "low", "high")
    paths = [write_csv(directory / "metrics.csv", rows, (*columns, "count_positive", "count_negative", "count_ood"))]
    if scores:
        grid = replace(metrics_grid(evaluation, scores), notes=tuple(notes_of(evaluation, scores)))
        paths.append(write_text(directory / "table.md", markdown(grid)))
        paths.append(write_text(directory / "table.tex", latex(grid)))
    return paths


def describe_environment() -> dict[str, str]:
    """Return the versions of Python and of the packages that the numbers depend on, and the kind of machine."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {**versions, "system": f"{platform.system()} {platform.machine()}"}


def write_run(
    directory: Path,
    results: pa.Table,
    evaluation: Evaluation,
    scores: Sequence[Score],
    *,
    model: Mapping[str, Any],
    descriptions: Mapping[str, str] | None = None,
    figures: Sequence[Mapping[str, str]] = (),
    command: str = "",
    timing: Mapping[str, float] | None = None,
    answers: Sequence[str] = (),
    thresholds: Thresholds | None = None,
) -> Path:
    """Write ``results.parquet`` and ``metrics.json`` to a run directory.

    Args:
        directory: The run directory; created if it does not exist.
        results: The per-sample table.
        evaluation: Its evaluation.
        scores: The scores, for their families and papers.
        model: The scored model: ``name``, ``checkpoint``, ``parameters``, ``classes``.
        descriptions: A short description of each dataset.
        figures: Pictures in the directory: ``file``, ``title`` and ``caption`` of each.
        command: The command line of the run.
        timing: Seconds per step.
        answers: Sentences that the report shows first.
        thresholds: The thresholds that the run applied, with their guarantee.

    Returns:
        The path of ``metrics.json``.
    """
    about = {
        "roles": evaluation.settings.get("roles", {}),
        "scores": [_score(score) for score in scores],
        "command": command,
    }
    described = results.replace_schema_metadata({**(results.schema.metadata or {}), "gradmetrics": json.dumps(about)})
    with replaced(directory / RESULTS_FILE) as file:
        pq.write_table(described, file)
    datasets = []
    for dataset in evaluation.datasets:
        datasets.append({**dataset, "description": (descriptions or {}).get(dataset["name"], "")})
    content = {
        "version": VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "environment": describe_environment(),
        "model": dict(model),
        "scores": [_score(score) for score in scores],
        "figures": [dict(figure) for figure in figures],
        "timing": dict(timing or {}),
        "answers": list(answers),
        "thresholds": None if thresholds is None else _applied(thresholds, results),
        **evaluation.to_dict(),
        "datasets": datasets,
    }
    return write_text(directory / METRICS_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _applied(thresholds: Thresholds, results: pa.Table) -> dict[str, Any]:
    """Return the thresholds, and the number of rows of each dataset that they accept."""
    return {**json.loads(thresholds.to_json()), "accepted": count_accepted(results, thresholds)}


def _score(score: Score) -> dict[str, Any]:
    arguments = {}
    for key, value in score.arguments.items():
        arguments[key] = value if isinstance(value, (str, int, float, type(None))) else str(value)
    return {
        "name": score.name,
        "family": score.recipe.family,
        "fit": kind_of(score),
        "forwards": score.needs.forwards,
        "target": _target(score),
        "summary": score.recipe.summary,
        "paper": score.recipe.paper,
        "arguments": arguments,
    }


def _target(score: Score) -> str:
    """Return the parameters that the score takes gradients with respect to."""
    needs = score.needs
    if needs.probes:
        return "model"
    return ", ".join(map(str, needs.gradients)) or ("head" if needs.features else "logits")
