"""Data of the command: named datasets with roles."""

from lightning_gradmetrics.cli.data.arrays import npz_data
from lightning_gradmetrics.cli.data.datamodule import datamodule
from lightning_gradmetrics.cli.data.digits import digits
from lightning_gradmetrics.cli.data.folders import image_folders
from lightning_gradmetrics.cli.data.huggingface_sets import huggingface_data
from lightning_gradmetrics.cli.data.sets import EvaluationData
from lightning_gradmetrics.cli.data.torchvision_sets import torchvision_data
from lightning_gradmetrics.cli.data.training import training_data

__all__ = [
    "EvaluationData",
    "datamodule",
    "digits",
    "huggingface_data",
    "image_folders",
    "npz_data",
    "torchvision_data",
    "training_data",
]
