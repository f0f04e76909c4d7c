"""The engine: statistics of every sample's gradient with respect to a model's parameters."""

from lightning_gradmetrics.engine.api import (
    ENGINES,
    eager,
    gradient_statistics,
    select_parameters,
)
from lightning_gradmetrics.gradients.statistics import GradientStatistics

__all__ = ["ENGINES", "eager", "GradientStatistics", "gradient_statistics", "select_parameters"]
