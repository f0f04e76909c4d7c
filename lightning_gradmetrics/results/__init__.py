"""The per-sample results table."""

from lightning_gradmetrics.results.table import largest

__all__ = ["largest"]
