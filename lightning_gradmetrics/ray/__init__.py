"""Scoring on engines for many machines: Ray Data and Spark."""

from lightning_gradmetrics.ray.scorer import Scorer

__all__ = ["Scorer"]
