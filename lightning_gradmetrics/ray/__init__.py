"""Scoring on engines for many machines: Ray Data and Spark."""

from lightning_gradmetrics.ray.scorer import Scorer
from lightning_gradmetrics.ray.spark import make_predict

__all__ = ["Scorer", "make_predict"]
