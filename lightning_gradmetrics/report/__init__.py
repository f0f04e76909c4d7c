"""The HTML report of a run: a single self-contained file made from a run directory.

It reads ``metrics.json`` and ``results.parquet``, so a report can be recreated later or on another machine:
``python -m lightning_gradmetrics.report RUN_DIRECTORY``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from lightning_gradmetrics.report.page import render, samples_to_show, texts_to_show
from lightning_gradmetrics.report.reading import read_run
from lightning_gradmetrics.report.run import METRICS_FILE, RESULTS_FILE, VERSION, ReportError
from lightning_gradmetrics.report.texts import TEXTS_FILE, texts_page, write_tokens
from lightning_gradmetrics.report.writing import write_metrics_tables, write_run
from lightning_gradmetrics.results.replacing import write_text

__all__ = [
    "METRICS_FILE",
    "RESULTS_FILE",
    "VERSION",
    "ReportError",
    "listed_samples",
    "write_metrics_tables",
    "write_report",
    "write_run",
    "write_texts",
]


def listed_samples(run_directory: Path | str) -> dict[str, list[int]]:
    """Return the indices of the samples listed in the report of a run, by dataset; these need thumbnails.

    Args:
        run_directory: Contains ``metrics.json`` and ``results.parquet``.

    Returns:
        The indices of each dataset, in ascending order.

    Raises:
        ReportError: If the run cannot be read.
    """
    return samples_to_show(read_run(Path(run_directory)))


def write_texts(run_directory: Path | str, results: pa.Table, decode: Callable[[list[int]], str] | None) -> Path:
    """Write the texts of a run as ``texts.html``, with every token coloured by the rank of its score.

    Args:
        run_directory: Contains ``metrics.json`` and ``results.parquet``.
        results: The results, of texts.
        decode: From token ids to their text, such as ``tokenizer.decode``; ``None`` shows the ids.

    Returns:
        The path of the written file.

    Raises:
        ReportError: If the run cannot be read.
    """
    directory = Path(run_directory)
    if decode is not None:
        write_tokens(directory, results, decode)
    return write_text(directory / TEXTS_FILE, texts_page(texts_to_show(read_run(directory))))


def write_report(run_directory: Path | str, output: Path | str | None = None) -> Path:
    """Write the report of a run as a single HTML file that works offline.

    Args:
        run_directory: Contains ``metrics.json`` and ``results.parquet``.
        output: The file to write; by default ``report.html`` in the run directory.

    Returns:
        The path of the written file.

    Raises:
        ReportError: If a file is missing, unreadable or of another version, or if the two files do not match.
    """
    run = read_run(Path(run_directory))
    path = run.directory / "report.html" if output is None else Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(run), encoding="utf-8")
    return path
