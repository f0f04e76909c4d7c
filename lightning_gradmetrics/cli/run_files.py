"""A run's files: the per-sample results, the metrics, and what they were made of."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_gradmetrics.evaluation import Evaluation
from lightning_gradmetrics.report import METRICS_FILE, RESULTS_FILE, VERSION
from lightning_gradmetrics.scores import Score

__all__ = ["describe_environment", "write_run"]

PACKAGES = ("lightning-gradmetrics", "torch", "lightning", "torchmetrics", "hydra-core", "numpy", "pyarrow")


def describe_environment() -> dict[str, str]:
    """Versions of Python and of the packages that the figures depend on, and the machine's kind."""
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
        directory: The run directory; made if it is not there.
        results: The per-sample table.
        evaluation: What it says.
        scores: The scores, for their families and papers.
        model: What was scored: ``name``, ``checkpoint``, ``parameters``, ``classes``.
        descriptions: A few words on each data set.
        figures: Pictures in the directory: ``file``, ``title`` and ``caption`` of each.
        command: The command line that made the run.
        timing: Seconds, by what took them.

    Returns:
        The path of ``metrics.json``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(results, directory / RESULTS_FILE)
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
        "datasets": [{**d, "description": (descriptions or {}).get(d["name"], "")} for d in evaluation.datasets],
    }
    path = directory / METRICS_FILE
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _score(score: Score) -> dict[str, Any]:
    needs = score.needs
    target = (
        "model" if needs.probes else ", ".join(map(str, needs.gradients)) or ("head" if needs.features else "logits")
    )
    return {
        "name": score.name,
        "family": score.recipe.family,
        "target": target,
        "summary": score.recipe.summary,
        "paper": score.recipe.paper,
        "arguments": {
            key: value if isinstance(value, (str, int, float, type(None))) else str(value)
            for key, value in score.arguments.items()
        },
    }
