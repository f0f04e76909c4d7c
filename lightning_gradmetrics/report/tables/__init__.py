"""Tables as plain grids that can be printed, or written as Markdown, LaTeX or CSV."""

from lightning_gradmetrics.report.tables.grid import Column, Grid, Group
from lightning_gradmetrics.report.tables.metrics import metrics_grid, metrics_grids, summary_grids
from lightning_gradmetrics.report.tables.terminal import grids_text, print_grid

__all__ = [
    "Column",
    "Grid",
    "Group",
    "grids_text",
    "metrics_grid",
    "metrics_grids",
    "print_grid",
    "summary_grids",
]
