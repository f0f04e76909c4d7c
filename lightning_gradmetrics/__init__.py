"""Per-sample gradient uncertainty scores for PyTorch Lightning."""

from lightning_gradmetrics import evaluation, meters, metrics, scores
from lightning_gradmetrics.callback import GradientMetrics
from lightning_gradmetrics.collector import GradientMetricCollector
from lightning_gradmetrics.cosine_similarity import cosine_similarity_maps
from lightning_gradmetrics.crossfit import cross_fit
from lightning_gradmetrics.engine import GradientStatistics, gradient_statistics
from lightning_gradmetrics.features import gradient_features
from lightning_gradmetrics.fitting import fit
from lightning_gradmetrics.profile import gradient_profile
from lightning_gradmetrics.results import largest
from lightning_gradmetrics.scoring import score

__version__ = "0.1.0"

__all__ = [
    "GradientMetricCollector",
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
    "metrics",
    "score",
    "scores",
]
