"""Step 6: write the other files of a run, each under a temporary name first."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from lightning_gradmetrics.cli.audit import with_planted
from lightning_gradmetrics.cli.cost_table import write_costs
from lightning_gradmetrics.cli.fitted_comparison import write_fitted_comparison
from lightning_gradmetrics.cli.leaderboard_record import leaderboard_record, write_record
from lightning_gradmetrics.cli.steps.evaluate import Evaluated
from lightning_gradmetrics.cli.steps.prepare import Experiment
from lightning_gradmetrics.cli.steps.score import Scored
from lightning_gradmetrics.pictures import sample_paths, write_thumbnails
from lightning_gradmetrics.report import (
    listed_samples,
    write_metrics_tables,
    write_report,
    write_run,
)
from lightning_gradmetrics.results.replacing import replaced, write_csv

__all__ = ["write"]


def write(
    experiment: Experiment,
    scored: Scored,
    evaluated: Evaluated,
    figures: Sequence[Mapping[str, str]],
    seconds: Mapping[str, float],
) -> dict[str, pa.Table]:
    """Write all results of a run to its directory, except the figures.

    Args:
        experiment: The run.
        scored: Its results.
        evaluated: Its metrics.
        figures: The files of the figures and their captions.
        seconds: The duration of each step.

    Returns:
        The tables of the callback, such as the samples with the largest scores.
    """
    directory, callback = experiment.directory, experiment.callback
    write_run(
        directory,
        _with_paths(scored.results, experiment.data.sets),
        evaluated.evaluation,
        scored.scores,
        model=experiment.description,
        descriptions=experiment.data.descriptions,
        figures=figures,
        command=shlex.join(["gradmetrics", *sys.argv[1:]]),
        timing=seconds,
        answers=evaluated.planted,
    )
    write_metrics_tables(evaluated.evaluation, evaluated.detectors, directory)
    if evaluated.fitted_comparison:
        write_fitted_comparison(evaluated.fitted_comparison, directory)
    if evaluated.costs:
        write_costs(evaluated.costs, experiment.scores, directory)
    if experiment.settings.leaderboard is not None:
        write_record(leaderboard_record(experiment, scored, evaluated), directory)
    if evaluated.areas:
        write_csv(directory / "auac_aufc.csv", evaluated.areas)
    tables = _callback_tables(experiment)
    if experiment.settings.report:
        with replaced(directory / "samples") as folder:
            listed = listed_samples(directory)
            write_thumbnails(folder.parent, experiment.data.sets, listed, callback.split_batch)
        with replaced(directory / "report.html") as file:
            write_report(directory, file)
    return tables


def _with_paths(results: pa.Table, datasets: Mapping[str, Any]) -> pa.Table:
    """Return the results with a column ``path``, if a dataset lists its files."""
    column: list[str | None] = [None] * results.num_rows
    names, indices = results["dataset"].to_pylist(), results["index"].to_pylist()
    known = {}
    for name, dataset in datasets.items():
        known[name] = sample_paths(dataset)
    if not any(known.values()):
        return results
    for row, (name, index) in enumerate(zip(names, indices, strict=True)):
        paths = known.get(name)
        if paths and index is not None and 0 <= index < len(paths):
            column[row] = paths[index]
    return results.append_column("path", pa.array(column, pa.string()))


def _callback_tables(experiment: Experiment) -> dict[str, pa.Table]:
    """Write the callback's tables as CSV, and return them; planted labels are marked."""
    tables = dict(experiment.callback.tables())
    if "largest" in tables and experiment.data.planted:
        tables["largest"] = with_planted(tables["largest"], experiment.data.planted)
    for name, table in tables.items():
        write_csv(experiment.directory / f"{name}.csv", table.to_pylist(), table.column_names)
    return tables
