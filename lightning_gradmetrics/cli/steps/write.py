"""Step 5: write the files of a run, each under a temporary name first."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_gradmetrics.cli.audit import with_planted
from lightning_gradmetrics.cli.cost_table import write_costs
from lightning_gradmetrics.cli.files import replaced, write_csv, write_text
from lightning_gradmetrics.cli.fitted_comparison import write_fitted_comparison
from lightning_gradmetrics.cli.steps.evaluate import Evaluated
from lightning_gradmetrics.cli.steps.prepare import Experiment
from lightning_gradmetrics.cli.steps.score import Scored
from lightning_gradmetrics.cli.tables.documents import latex, markdown
from lightning_gradmetrics.cli.tables.marks import kind_of
from lightning_gradmetrics.cli.tables.metrics import metrics_grid, notes_of
from lightning_gradmetrics.evaluation import Evaluation
from lightning_gradmetrics.pictures import write_pictures
from lightning_gradmetrics.report import METRICS_FILE, RESULTS_FILE, VERSION, write_report
from lightning_gradmetrics.scores import Score

__all__ = ["describe_environment", "write", "write_metrics_tables", "write_run"]

PACKAGES = ("lightning-gradmetrics", "torch", "lightning", "torchmetrics", "hydra-core", "numpy", "pyarrow")


def write(
    experiment: Experiment, scored: Scored, evaluated: Evaluated, seconds: Mapping[str, float]
) -> dict[str, pa.Table]:
    """Write everything that a run made to its directory.

    Args:
        experiment: The run.
        scored: Its results.
        evaluated: Its metrics.
        seconds: How long each step took.

    Returns:
        The tables of the callback, such as the samples with the largest scores.
    """
    directory, callback = experiment.directory, experiment.callback
    with replaced(directory / "figures") as folder:
        figures = write_pictures(callback.pictures(), folder.parent)
        folder.mkdir(exist_ok=True)
    write_run(
        directory,
        scored.results,
        evaluated.evaluation,
        scored.scores,
        model=experiment.description,
        descriptions=experiment.data.descriptions,
        figures=figures,
        command=shlex.join(["gradmetrics", *sys.argv[1:]]),
        timing=seconds,
    )
    write_metrics_tables(evaluated.evaluation, evaluated.detectors, directory)
    if evaluated.fitted_comparison:
        write_fitted_comparison(evaluated.fitted_comparison, directory)
    if evaluated.costs:
        write_costs(evaluated.costs, experiment.scores, directory)
    if evaluated.areas:
        write_csv(directory / "auac_aufc.csv", evaluated.areas)
    tables = _callback_tables(experiment)
    if experiment.settings.report:
        with replaced(directory / "report.html") as file:
            write_report(directory, file)
    return tables


def _callback_tables(experiment: Experiment) -> dict[str, pa.Table]:
    """Write the callback's tables as CSV, and return them; planted labels are marked."""
    tables = dict(experiment.callback.tables())
    if "largest" in tables and experiment.data.planted:
        tables["largest"] = with_planted(tables["largest"], experiment.data.planted)
    for name, table in tables.items():
        write_csv(experiment.directory / f"{name}.csv", table.to_pylist(), table.column_names)
    return tables


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
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions, "system": f"{platform.system()} {platform.machine()}"}


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
) -> Path:
    """Write ``results.parquet`` and ``metrics.json`` to a run directory.

    Args:
        directory: The run directory; created if it does not exist.
        results: The per-sample table.
        evaluation: Its evaluation.
        scores: The scores, for their families and papers.
        model: The scored model: ``name``, ``checkpoint``, ``parameters``, ``classes``.
        descriptions: A few words on each data set.
        figures: Pictures in the directory: ``file``, ``title`` and ``caption`` of each.
        command: The command line of the run.
        timing: Seconds per step.

    Returns:
        The path of ``metrics.json``.
    """
    with replaced(directory / RESULTS_FILE) as file:
        pq.write_table(results, file)
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
        **evaluation.to_dict(),
        "datasets": datasets,
    }
    return write_text(directory / METRICS_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _score(score: Score) -> dict[str, Any]:
    arguments = {}
    for key, value in score.arguments.items():
        arguments[key] = value if isinstance(value, (str, int, float, type(None))) else str(value)
    return {
        "name": score.name,
        "family": score.recipe.family,
        "fit": kind_of(score),
        "target": _target(score),
        "summary": score.recipe.summary,
        "paper": score.recipe.paper,
        "arguments": arguments,
    }


def _target(score: Score) -> str:
    """What the score takes gradients with respect to."""
    needs = score.needs
    if needs.probes:
        return "model"
    return ", ".join(map(str, needs.gradients)) or ("head" if needs.features else "logits")
