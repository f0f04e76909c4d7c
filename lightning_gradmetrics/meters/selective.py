"""Meters of selective prediction: what is won by rejecting the most uncertain samples."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_gradmetrics.meters.base import CurveMeter, ScoreMeter
from lightning_gradmetrics.meters.functional import areas, selective
from lightning_gradmetrics.meters.functional.areas import Mode
from lightning_gradmetrics.meters.functional.counts import announce_undefined, check_rate

__all__ = ["AUAC", "AUFC", "AUGRC", "AURC", "EAURC", "AccuracyAtCoverage", "CoverageAtRisk", "RiskCoverageCurve"]


class AURC(ScoreMeter):
    """Area under the risk-coverage curve; see :func:`~lightning_gradmetrics.meters.functional.aurc`.

    Example:
        >>> import torch
        >>> meter = AURC()
        >>> meter.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0]))
        >>> meter.compute()
        tensor(0.2778)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The AURC of all samples so far; NaN with a UserWarning if there are none."""
        return announce_undefined(selective.aurc_of_counts(self._counts()), "AURC", selective.SOME)


class EAURC(ScoreMeter):
    """Excess AURC over a perfect score; see :func:`~lightning_gradmetrics.meters.functional.e_aurc`."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """The excess AURC of all samples so far; NaN with a UserWarning if there are none."""
        return announce_undefined(selective.e_aurc_of_counts(self._counts()), "E-AURC", selective.SOME)


class AUGRC(ScoreMeter):
    """Area under the generalised risk-coverage curve; see :func:`~lightning_gradmetrics.meters.functional.augrc`."""

    higher_is_better = False
    plot_upper_bound = 0.5

    def compute(self) -> Tensor:
        """The AUGRC of all samples so far; NaN with a UserWarning if there are none."""
        return announce_undefined(selective.augrc_of_counts(self._counts()), "AUGRC", selective.SOME)


class AccuracyAtCoverage(ScoreMeter):
    """Accuracy of the most certain samples; see :func:`~lightning_gradmetrics.meters.functional.accuracy_at_coverage`.

    Args:
        coverage: The share of samples that is accepted, in (0, 1].
        bins: ``None`` for the exact mode, or a number for constant memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, coverage: float = 0.9, bins: int | None = None, **kwargs: Any) -> None:
        super().__init__(bins, **kwargs)
        self.coverage = check_rate(coverage, "coverage")

    def compute(self) -> Tensor:
        """The accuracy at the coverage; NaN with a UserWarning if there are no samples."""
        value = selective.accuracy_at_coverage_of_counts(self._counts(), self.coverage)
        return announce_undefined(value, "accuracy at coverage", selective.SOME)


class CoverageAtRisk(ScoreMeter):
    """Largest coverage at a bounded error rate; see :func:`~lightning_gradmetrics.meters.functional.coverage_at_risk`.

    Args:
        risk: The error rate among the accepted that is allowed, in (0, 1].
        bins: ``None`` for the exact mode, or a number for constant memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, risk: float = 0.05, bins: int | None = None, **kwargs: Any) -> None:
        super().__init__(bins, **kwargs)
        self.risk = check_rate(risk, "risk")

    def compute(self) -> Tensor:
        """The coverage at the risk; NaN with a UserWarning if there are no samples."""
        value = selective.coverage_at_risk_of_counts(self._counts(), self.risk)
        return announce_undefined(value, "coverage at risk", selective.SOME)


class _Area(ScoreMeter):
    """An area over coverage or over a threshold.

    Args:
        mode: ``"coverage"`` or ``"threshold"``.
        bins: ``None`` for the exact mode, or a number for constant memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, mode: Mode = "coverage", bins: int | None = None, **kwargs: Any) -> None:
        super().__init__(bins, **kwargs)
        self.mode: Mode = areas.check_mode(mode)


class AUAC(_Area):
    """Area under the accuracy curve; see :func:`~lightning_gradmetrics.meters.functional.auac`."""

    def compute(self) -> Tensor:
        """The AUAC of all samples so far; NaN with a UserWarning where it is undefined."""
        return announce_undefined(areas.auac_of_counts(self._counts(), self.mode), "AUAC", areas.NEEDS[self.mode])


class AUFC(_Area):
    """Area under the F1 curve; see :func:`~lightning_gradmetrics.meters.functional.aufc`."""

    def compute(self) -> Tensor:
        """The AUFC of all samples so far; NaN with a UserWarning where it is undefined."""
        return announce_undefined(areas.aufc_of_counts(self._counts(), self.mode), "AUFC", areas.NEEDS[self.mode])


class RiskCoverageCurve(CurveMeter):
    """The risk-coverage curve; see :func:`~lightning_gradmetrics.meters.functional.risk_coverage_curve`."""

    higher_is_better = None
    axes = ("coverage", "risk")

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Coverage, risk and thresholds of all samples so far."""
        return selective.risk_coverage_curve_of_counts(self._counts())
