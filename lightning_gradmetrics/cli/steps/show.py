"""Step 7: print the tables to the standard output stream, and the paths of the files to the standard error stream."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
from rich.console import Console

from lightning_gradmetrics.cli.audit import top_samples_grid
from lightning_gradmetrics.cli.cost_table import cost_grid_of_width
from lightning_gradmetrics.cli.files import shown_path
from lightning_gradmetrics.cli.fitted_comparison import fitted_comparison_grids
from lightning_gradmetrics.cli.progress import notice
from lightning_gradmetrics.cli.selective_areas import areas_grid
from lightning_gradmetrics.cli.steps.evaluate import Evaluated
from lightning_gradmetrics.cli.steps.prepare import Experiment
from lightning_gradmetrics.report.tables.metrics import summary_grids
from lightning_gradmetrics.report.tables.terminal import print_grid, print_line

__all__ = ["show"]


def show(experiment: Experiment, evaluated: Evaluated, tables: Mapping[str, pa.Table]) -> None:
    """Print the tables of a run.

    Args:
        experiment: The run.
        evaluated: Its metrics.
        tables: The tables of the callback.
    """
    console = Console()
    for statement in evaluated.planted:
        print_line(console, statement)
    if "largest" in tables:
        print_grid(console, top_samples_grid(tables["largest"]))
    if evaluated.costs:
        print_grid(console, cost_grid_of_width(evaluated.costs, experiment.scores, console.width))
    elif evaluated.detectors:
        for grid in summary_grids(evaluated.evaluation, evaluated.detectors, console.width):
            print_grid(console, grid)
    for grid in fitted_comparison_grids(evaluated.fitted_comparison):
        print_grid(console, grid)
    if evaluated.areas:
        print_grid(console, areas_grid(evaluated.areas))
    notice(f"Results: {shown_path(experiment.directory)}")
    if experiment.settings.report:
        notice(f"Report:  {shown_path(experiment.directory / 'report.html')}")
