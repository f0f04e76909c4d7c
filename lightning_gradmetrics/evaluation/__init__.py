"""Evaluates a table of per-sample scores: metrics, intervals, comparisons and thresholds."""

from lightning_gradmetrics.evaluation.metrics import METRICS, Metric, register_metric
from lightning_gradmetrics.evaluation.protocol import evaluate
from lightning_gradmetrics.evaluation.record import Evaluation
from lightning_gradmetrics.evaluation.risk_rules import JointRisk, LearnThenTest, SelectiveRisk
from lightning_gradmetrics.evaluation.rules import Conformal, Coverage, TruePositiveRate
from lightning_gradmetrics.evaluation.thresholds import (
    Thresholds,
    apply_thresholds,
    conformal_p_values,
    fit_thresholds,
)

__all__ = [
    "METRICS",
    "Conformal",
    "Coverage",
    "Evaluation",
    "JointRisk",
    "LearnThenTest",
    "Metric",
    "SelectiveRisk",
    "Thresholds",
    "TruePositiveRate",
    "apply_thresholds",
    "conformal_p_values",
    "evaluate",
    "fit_thresholds",
    "register_metric",
]
