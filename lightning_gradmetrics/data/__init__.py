"""Data for experiments: named sets with roles."""

from lightning_gradmetrics.data.digits import digits
from lightning_gradmetrics.data.folders import image_folders
from lightning_gradmetrics.data.sets import EvaluationData
from lightning_gradmetrics.data.training import training_data

__all__ = ["EvaluationData", "digits", "image_folders", "training_data"]
