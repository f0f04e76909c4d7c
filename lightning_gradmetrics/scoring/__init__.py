"""Computes scores of a model's batches: evidence, registry, scorer, and fits of fitted scores."""

from lightning_gradmetrics.scoring.cross_fitting import cross_fit
from lightning_gradmetrics.scoring.direct import score
from lightning_gradmetrics.scoring.features import gradient_features
from lightning_gradmetrics.scoring.fitting import fit
from lightning_gradmetrics.scoring.layer_profile import gradient_profile

__all__ = ["cross_fit", "fit", "gradient_features", "gradient_profile", "score"]
