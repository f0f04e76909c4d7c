"""The table of meters: the arguments of each, its functional form, and its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torchmetrics import Metric

from lightning_gradmetrics import meters as M
from lightning_gradmetrics.meters import functional as F

SIZE = 103


@dataclass(frozen=True)
class Case:
    """A meter, its functional form and its inputs."""

    make: Callable[..., Metric]
    twin: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    inputs: str = "scores target"
    higher_is_better: bool | None = True
    constant: bool = True


CASES = {
    "AUROC": Case(M.AUROC, F.auroc),
    "AveragePrecision": Case(M.AveragePrecision, F.average_precision),
    "AveragePrecision in": Case(M.AveragePrecision, F.average_precision, {"positive": "in"}),
    "FPRAtTPR": Case(M.FPRAtTPR, F.fpr_at_tpr, higher_is_better=False),
    "FPRAtTPR in": Case(M.FPRAtTPR, F.fpr_at_tpr, {"rate": 0.8, "positive": "in"}, higher_is_better=False),
    "AURC": Case(M.AURC, F.aurc, higher_is_better=False),
    "EAURC": Case(M.EAURC, F.e_aurc, higher_is_better=False),
    "AUGRC": Case(M.AUGRC, F.augrc, higher_is_better=False),
    "AccuracyAtCoverage": Case(M.AccuracyAtCoverage, F.accuracy_at_coverage, {"coverage": 0.6}),
    "CoverageAtRisk": Case(M.CoverageAtRisk, F.coverage_at_risk, {"risk": 0.3}),
    "AUAC": Case(M.AUAC, F.auac),
    "AUAC threshold": Case(M.AUAC, F.auac, {"mode": "threshold"}),
    "AUFC": Case(M.AUFC, F.aufc),
    "AUFC threshold": Case(M.AUFC, F.aufc, {"mode": "threshold"}),
    "OSCR": Case(M.OSCR, F.oscr, inputs="scores target correct"),
    "ROC": Case(M.ROC, F.roc, higher_is_better=None),
    "PrecisionRecallCurve": Case(M.PrecisionRecallCurve, F.precision_recall_curve, higher_is_better=None),
    "PrecisionRecallCurve in": Case(
        M.PrecisionRecallCurve, F.precision_recall_curve, {"positive": "in"}, higher_is_better=None
    ),
    "RiskCoverageCurve": Case(M.RiskCoverageCurve, F.risk_coverage_curve, higher_is_better=None),
    "ScoreDistribution": Case(M.ScoreDistribution, F.distribution, inputs="scores", higher_is_better=None),
    "CalibrationError": Case(
        M.CalibrationError, F.calibration_error, {"n_bins": 5}, "probability target", False, constant=False
    ),
    "SpearmanCorrelation": Case(
        M.SpearmanCorrelation, F.spearman, inputs="several", higher_is_better=None, constant=False
    ),
}
MODES = [(name, bins) for name, case in CASES.items() for bins in ((None, 1024) if case.constant else (None,))]


def data(inputs: str, size: int = SIZE) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(size, generator=generator)
    values = {
        "scores": (z * 40).round(),
        "target": (torch.rand(size, generator=generator) < torch.sigmoid(z)).long(),
        "correct": (torch.rand(size, generator=generator) < 0.8).long(),
        "probability": torch.sigmoid(z),
        "several": torch.stack([z, z.square(), z.round()], 1),
    }
    return tuple(values[name] for name in inputs.split())


def made(case: Case, bins: int | None) -> Metric:
    return case.make(**case.arguments, **({"bins": bins} if case.constant else {}))


def expected(case: Case, rows: tuple[torch.Tensor, ...]) -> Any:
    return case.twin(*rows, **case.arguments)


def assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        found, wanted = list(found.values()), list(wanted.values())
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6, check_dtype=False)
