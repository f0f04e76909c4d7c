"""Matplotlib plots of a results table, on given or new axes, returned as objects that can be restyled."""

from lightning_gradmetrics.pictures.plot.curves import risk_coverage, roc
from lightning_gradmetrics.pictures.plot.distributions import distributions

__all__ = ["distributions", "risk_coverage", "roc"]
