"""The interface of the package ``gradient_metrics``; changing the import is enough to use this package's engine."""

from lightning_gradmetrics.compat.gradient_metrics import metrics
from lightning_gradmetrics.compat.gradient_metrics.collector import GradientMetricCollector

__all__ = ["GradientMetricCollector", "metrics"]
