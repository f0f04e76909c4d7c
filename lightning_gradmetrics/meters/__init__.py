"""Meters: torchmetrics of raw uncertainty scores; ``meters.functional`` has them as plain functions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gradmetrics.meters import functional
    from lightning_gradmetrics.meters.ranking import AUROC, OSCR, ROC, AveragePrecision, FPRAtTPR, PrecisionRecallCurve
    from lightning_gradmetrics.meters.selective import (
        AUAC,
        AUFC,
        AUGRC,
        AURC,
        EAURC,
        AccuracyAtCoverage,
        CoverageAtRisk,
        RiskCoverageCurve,
    )
    from lightning_gradmetrics.meters.summary import CalibrationError, ScoreDistribution, SpearmanCorrelation

__all__ = [
    "AUAC",
    "AUFC",
    "AUGRC",
    "AURC",
    "AUROC",
    "EAURC",
    "OSCR",
    "ROC",
    "AccuracyAtCoverage",
    "AveragePrecision",
    "CalibrationError",
    "CoverageAtRisk",
    "FPRAtTPR",
    "PrecisionRecallCurve",
    "RiskCoverageCurve",
    "ScoreDistribution",
    "SpearmanCorrelation",
    "functional",
]

_MODULES = {
    "ranking": ("AUROC", "OSCR", "ROC", "AveragePrecision", "FPRAtTPR", "PrecisionRecallCurve"),
    "selective": (
        "AUAC",
        "AUFC",
        "AUGRC",
        "AURC",
        "EAURC",
        "AccuracyAtCoverage",
        "CoverageAtRisk",
        "RiskCoverageCurve",
    ),
    "summary": ("CalibrationError", "ScoreDistribution", "SpearmanCorrelation"),
}
"""The meters of each module."""


def __getattr__(name: str) -> Any:
    """Import a meter on its first use, because torchmetrics takes a second and ``meters.functional`` does not need it."""
    if name == "functional":
        return import_module(f"{__name__}.functional")
    for module, meters in _MODULES.items():
        if name in meters:
            value = getattr(import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, without the imports of this file, for completion."""
    return sorted(__all__)
