"""Per-sample gradient uncertainty scores for PyTorch Lightning."""

from lightning_gradmetrics import scores
from lightning_gradmetrics.engine import GradientStatistics, gradient_statistics
from lightning_gradmetrics.scoring import score

__version__ = "0.1.0"

__all__ = ["GradientStatistics", "gradient_statistics", "score", "scores"]
