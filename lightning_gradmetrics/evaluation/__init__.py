"""Evaluates a table of per-sample scores: metrics, intervals, comparisons and thresholds."""

from lightning_gradmetrics.evaluation.metrics import register_metric
from lightning_gradmetrics.evaluation.protocol import evaluate
from lightning_gradmetrics.evaluation.record import Evaluation
from lightning_gradmetrics.evaluation.thresholds import Thresholds, conformal_p_values, fit_thresholds

__all__ = ["Evaluation", "Thresholds", "conformal_p_values", "evaluate", "fit_thresholds", "register_metric"]
