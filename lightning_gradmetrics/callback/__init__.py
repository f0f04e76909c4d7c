"""The Lightning callback."""

from lightning_gradmetrics.callback.callback import GradientMetrics

__all__ = ["GradientMetrics"]
