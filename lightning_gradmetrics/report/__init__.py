"""The HTML report of a run: one self-contained file, made from the files of a run directory.

It reads ``metrics.json`` and ``results.parquet``, so a report can be made again later or on another machine:
``python -m lightning_gradmetrics.report RUN_DIRECTORY``.
"""

from __future__ import annotations

from pathlib import Path

from lightning_gradmetrics.report.page import render
from lightning_gradmetrics.report.reading import read_run
from lightning_gradmetrics.report.run import METRICS_FILE, RESULTS_FILE, VERSION, ReportError

__all__ = ["METRICS_FILE", "RESULTS_FILE", "VERSION", "ReportError", "write_report"]


def write_report(run_directory: Path | str, output: Path | str | None = None) -> Path:
    """Write the report of a run as one HTML file that needs no network.

    Args:
        run_directory: Contains ``metrics.json`` and ``results.parquet``.
        output: The file to write; by default ``report.html`` in the run directory.

    Returns:
        The path of the written file.

    Raises:
        ReportError: If a file is missing, cannot be read, has another version, or the two files do not match.
    """
    run = read_run(Path(run_directory))
    path = run.directory / "report.html" if output is None else Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(run), encoding="utf-8")
    return path
