"""Plots of a results table with Matplotlib, on your axes or on new ones, as objects that you can restyle."""

from lightning_gradmetrics.pictures.plot.curves import risk_coverage, roc
from lightning_gradmetrics.pictures.plot.distributions import distributions
from lightning_gradmetrics.pictures.plot.style import Plot

__all__ = ["Plot", "distributions", "risk_coverage", "roc"]
