"""Per-sample gradient uncertainty scores for PyTorch Lightning."""

from lightning_gradmetrics import meters, scores
from lightning_gradmetrics.callback import GradientMetrics
from lightning_gradmetrics.features import gradient_features
from lightning_gradmetrics.fitting import fit
from lightning_gradmetrics.engine import GradientStatistics, gradient_statistics
from lightning_gradmetrics.scoring import score

__version__ = "0.1.0"

__all__ = ["GradientMetrics", "GradientStatistics", "fit", "gradient_features", "gradient_statistics", "meters", "score", "scores"]
