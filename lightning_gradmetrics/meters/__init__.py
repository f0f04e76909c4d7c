"""Meters: torchmetrics over raw uncertainty scores, and the same as plain functions in ``meters.functional``."""

from lightning_gradmetrics.meters import functional
from lightning_gradmetrics.meters.ranking import AUROC, AveragePrecision, FPRAtTPR
from lightning_gradmetrics.meters.selective import AUGRC, AURC, EAURC

__all__ = ["AUGRC", "AURC", "AUROC", "EAURC", "AveragePrecision", "FPRAtTPR", "functional"]
