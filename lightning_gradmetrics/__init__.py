"""Per-sample gradient uncertainty scores for PyTorch Lightning."""

from lightning_gradmetrics import evaluation, meters, scores
from lightning_gradmetrics.callback import GradientMetrics
from lightning_gradmetrics.engine import GradientStatistics, gradient_statistics
from lightning_gradmetrics.gradients import cosine_similarity_maps
from lightning_gradmetrics.results import largest, read_results
from lightning_gradmetrics.scoring import cross_fit, fit, gradient_features, gradient_profile, score

__version__ = "0.1.0"

__all__ = [
    "GradientMetrics",
    "GradientStatistics",
    "cosine_similarity_maps",
    "cross_fit",
    "evaluation",
    "fit",
    "gradient_features",
    "gradient_profile",
    "gradient_statistics",
    "largest",
    "meters",
    "read_results",
    "score",
    "scores",
]
