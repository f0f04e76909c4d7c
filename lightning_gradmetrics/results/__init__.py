"""The per-sample results table, in memory and on disk."""

from lightning_gradmetrics.results.parts import ResumeError
from lightning_gradmetrics.results.reading import IncompleteResultsError, read_results
from lightning_gradmetrics.results.resuming import unfinished

__all__ = ["IncompleteResultsError", "ResumeError", "read_results", "unfinished"]
