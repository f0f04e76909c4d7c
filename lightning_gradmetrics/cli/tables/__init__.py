"""Tables of the command: built as plain grids, then printed or written as Markdown, LaTeX or CSV."""

from lightning_gradmetrics.cli.tables.grid import Column, Grid, Group
from lightning_gradmetrics.cli.tables.metrics import metrics_grid, metrics_grids
from lightning_gradmetrics.cli.tables.terminal import print_grid

__all__ = ["Column", "Grid", "Group", "metrics_grid", "metrics_grids", "print_grid"]
