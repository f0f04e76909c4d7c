"""Judge a table of per-sample scores: metrics, bootstrap intervals, comparisons, and thresholds."""

from lightning_gradmetrics.evaluation.protocol import HIGHER_IS_BETTER, TASKS, Evaluation, evaluate
from lightning_gradmetrics.evaluation.thresholds import Thresholds, apply_thresholds, fit_thresholds

__all__ = [
    "HIGHER_IS_BETTER",
    "TASKS",
    "Evaluation",
    "Thresholds",
    "apply_thresholds",
    "evaluate",
    "fit_thresholds",
]
