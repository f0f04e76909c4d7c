"""The per-sample results table."""

from lightning_gradmetrics.results.parts import read_results
from lightning_gradmetrics.results.table import largest

__all__ = ["largest", "read_results"]
