"""Scores in the interfaces of other libraries: a pytorch-ood detector and an OpenOOD postprocessor."""

from lightning_gradmetrics.export.openood_postprocessor import openood
from lightning_gradmetrics.export.pytorch_ood_detector import pytorch_ood

__all__ = ["openood", "pytorch_ood"]
