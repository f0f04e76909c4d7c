"""Meters of selective prediction: the errors that remain when the most uncertain samples are rejected."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_gradmetrics.meters.base import CurveMeter, ScoreMeter
from lightning_gradmetrics.meters.functional import areas, selective
from lightning_gradmetrics.meters.functional.areas import Mode
from lightning_gradmetrics.meters.functional.counts import announce_undefined, check_rate

__all__ = ["AUAC", "AUFC", "AUGRC", "AURC", "EAURC", "AccuracyAtCoverage", "CoverageAtRisk", "RiskCoverageCurve"]


class AURC(ScoreMeter):
    """Area under the risk-coverage curve: the mean error rate of the ``k`` most certain samples over all ``k``.

    The functional form is :func:`~lightning_gradmetrics.meters.functional.aurc`.

    Args:
        bins: ``None`` keeps every score (exact); a number of at least 1024 limits the memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Returns:
        ``compute()`` returns a scalar in [0, 1], lower is better; NaN with a UserWarning without samples.

    Raises:
        ValueError: If an argument is wrong, or a batch has a wrong shape, a NaN, or a target that is neither 0 nor 1.

    Example:
        >>> import torch
        >>> meter = AURC()
        >>> meter.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0]))
        >>> meter.compute()
        tensor(0.2778)

    Reference:
        Geifman, Uziel, El-Yaniv: Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers, ICLR 2019.
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the AURC of all samples so far; NaN with a UserWarning if there are none."""
        return announce_undefined(selective.aurc_of_counts(self._counts()), "AURC", selective.SOME)


class EAURC(ScoreMeter):
    """Excess AURC: the AURC minus that of a perfect score with the same number of errors.

    The functional form is :func:`~lightning_gradmetrics.meters.functional.e_aurc`.

    Args:
        bins: ``None`` keeps every score (exact); a number of at least 1024 limits the memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Returns:
        ``compute()`` returns a scalar in [0, 1], lower is better; NaN with a UserWarning without samples.

    Raises:
        ValueError: If an argument is wrong, or a batch has a wrong shape, a NaN, or a target that is neither 0 nor 1.

    Example:
        >>> import torch
        >>> meter = EAURC()
        >>> meter.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0]))
        >>> meter.compute()
        tensor(0.1667)

    Reference:
        Geifman, Uziel, El-Yaniv: Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers, ICLR 2019.
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the excess AURC of all samples so far; NaN with a UserWarning if there are none."""
        return announce_undefined(selective.e_aurc_of_counts(self._counts()), "E-AURC", selective.SOME)


class AUGRC(ScoreMeter):
    """Area under the generalised risk-coverage curve: the mean rate of accepted errors over all coverages.

    The functional form is :func:`~lightning_gradmetrics.meters.functional.augrc`.

    Args:
        bins: ``None`` keeps every score (exact); a number of at least 1024 limits the memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Returns:
        ``compute()`` returns a scalar in [0, 1/2], lower is better; NaN with a UserWarning without samples.

    Raises:
        ValueError: If an argument is wrong, or a batch has a wrong shape, a NaN, or a target that is neither 0 nor 1.

    Example:
        >>> import torch
        >>> meter = AUGRC()
        >>> meter.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0]))
        >>> meter.compute()
        tensor(0.1667)

    Reference:
        Traub et al.: Overcoming Common Flaws in the Evaluation of Selective Classification Systems, NeurIPS 2024.
    """

    higher_is_better = False
    plot_upper_bound = 0.5

    def compute(self) -> Tensor:
        """Return the AUGRC of all samples so far; NaN with a UserWarning if there are none."""
        return announce_undefined(selective.augrc_of_counts(self._counts()), "AUGRC", selective.SOME)


class AccuracyAtCoverage(ScoreMeter):
    """Accuracy of the most certain samples.

    The functional form is :func:`~lightning_gradmetrics.meters.functional.accuracy_at_coverage`.

    Args:
        coverage: The fraction of samples to accept, in (0, 1].
        bins: ``None`` keeps every score (exact); a number of at least 1024 limits the memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Returns:
        ``compute()`` returns a scalar in [0, 1], higher is better; NaN with a UserWarning without samples.

    Raises:
        ValueError: If an argument is wrong, or a batch has a wrong shape, a NaN, or a target that is neither 0 nor 1.

    Example:
        >>> import torch
        >>> meter = AccuracyAtCoverage(coverage=0.6)
        >>> meter.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0]))
        >>> meter.compute()
        tensor(0.5000)

    Reference:
        El-Yaniv, Wiener: On the Foundations of Noise-free Selective Classification, JMLR 2010.
    """

    higher_is_better = True

    def __init__(self, coverage: float = 0.9, bins: int | None = None, **kwargs: Any) -> None:
        super().__init__(bins, **kwargs)
        self.coverage = check_rate(coverage, "coverage")

    def compute(self) -> Tensor:
        """Return the accuracy at the coverage; NaN with a UserWarning if there are no samples."""
        value = selective.accuracy_at_coverage_of_counts(self._counts(), self.coverage)
        return announce_undefined(value, "accuracy at coverage", selective.SOME)


class CoverageAtRisk(ScoreMeter):
    """Largest fraction of samples that a threshold accepts with a bounded error rate.

    The functional form is :func:`~lightning_gradmetrics.meters.functional.coverage_at_risk`.

    Args:
        risk: The largest error rate among the accepted samples, in (0, 1].
        bins: ``None`` keeps every score (exact); a number of at least 1024 limits the memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Returns:
        ``compute()`` returns a scalar in [0, 1], higher is better; NaN with a UserWarning without samples.

    Raises:
        ValueError: If an argument is wrong, or a batch has a wrong shape, a NaN, or a target that is neither 0 nor 1.

    Example:
        >>> import torch
        >>> meter = CoverageAtRisk(risk=0.4)
        >>> meter.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0]))
        >>> meter.compute()
        tensor(1.)

    Reference:
        El-Yaniv, Wiener: On the Foundations of Noise-free Selective Classification, JMLR 2010.
    """

    higher_is_better = True

    def __init__(self, risk: float = 0.05, bins: int | None = None, **kwargs: Any) -> None:
        super().__init__(bins, **kwargs)
        self.risk = check_rate(risk, "risk")

    def compute(self) -> Tensor:
        """Return the coverage at the risk; NaN with a UserWarning if there are no samples."""
        value = selective.coverage_at_risk_of_counts(self._counts(), self.risk)
        return announce_undefined(value, "coverage at risk", selective.SOME)


class AUAC(ScoreMeter):
    """Area under the accuracy curve, over coverage or over the threshold.

    The functional form is :func:`~lightning_gradmetrics.meters.functional.auac`.

    Args:
        mode: The x-axis: ``"coverage"``, or ``"threshold"`` on scores scaled to [0, 1] by minimum and maximum.
        bins: ``None`` keeps every score (exact); a number of at least 1024 limits the memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Returns:
        ``compute()`` returns a scalar in [0, 1], higher is better; NaN with a UserWarning where it is undefined.

    Raises:
        ValueError: If an argument is wrong, or a batch has a wrong shape, a NaN, or a target that is neither 0 nor 1.

    Example:
        >>> import torch
        >>> meter = AUAC()
        >>> meter.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0]))
        >>> meter.compute()
        tensor(0.7222)

    Reference:
        Prabhushankar, AlRegib: Counterfactual Gradients-based Quantification of Prediction Trust in Neural Networks,
        2024.
    """

    higher_is_better = True

    def __init__(self, mode: Mode = "coverage", bins: int | None = None, **kwargs: Any) -> None:
        super().__init__(bins, **kwargs)
        self.mode: Mode = areas.check_mode(mode)

    def compute(self) -> Tensor:
        """Return the AUAC of all samples so far; NaN with a UserWarning where it is undefined."""
        return announce_undefined(areas.auac_of_counts(self._counts(), self.mode), "AUAC", areas.NEEDS[self.mode])


class AUFC(ScoreMeter):
    """Area under the F1 curve, over coverage or over the threshold.

    The functional form is :func:`~lightning_gradmetrics.meters.functional.aufc`.

    Args:
        mode: The x-axis: ``"coverage"``, or ``"threshold"`` on scores scaled to [0, 1] by minimum and maximum.
        bins: ``None`` keeps every score (exact); a number of at least 1024 limits the memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Returns:
        ``compute()`` returns a scalar in [0, 1], higher is better; NaN with a UserWarning where it is undefined.

    Raises:
        ValueError: If an argument is wrong, or a batch has a wrong shape, a NaN, or a target that is neither 0 nor 1.

    Example:
        >>> import torch
        >>> meter = AUFC()
        >>> meter.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0]))
        >>> meter.compute()
        tensor(0.6556)

    Reference:
        Prabhushankar, AlRegib: Counterfactual Gradients-based Quantification of Prediction Trust in Neural Networks,
        2024.
    """

    higher_is_better = True

    def __init__(self, mode: Mode = "coverage", bins: int | None = None, **kwargs: Any) -> None:
        super().__init__(bins, **kwargs)
        self.mode: Mode = areas.check_mode(mode)

    def compute(self) -> Tensor:
        """Return the AUFC of all samples so far; NaN with a UserWarning where it is undefined."""
        return announce_undefined(areas.aufc_of_counts(self._counts(), self.mode), "AUFC", areas.NEEDS[self.mode])


class RiskCoverageCurve(CurveMeter):
    """The risk-coverage curve: one point per distinct score, in the unit of the scores.

    The functional form is :func:`~lightning_gradmetrics.meters.functional.risk_coverage_curve`.

    Args:
        bins: ``None`` keeps every score (exact); a number of at least 1024 limits the memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Returns:
        ``compute()`` returns coverage, risk and thresholds, ``(G,)`` each, in ascending order; empty tensors with a
        UserWarning without samples.

    Raises:
        ValueError: If an argument is wrong, or a batch has a wrong shape, a NaN, or a target that is neither 0 nor 1.

    Example:
        >>> import torch
        >>> meter = RiskCoverageCurve()
        >>> meter.update(torch.tensor([-1.0, 5.0, 5.0, 7.0]), torch.tensor([0, 1, 0, 1]))
        >>> meter.compute()
        (tensor([0.2500, 0.7500, 1.0000]), tensor([0.0000, 0.3333, 0.5000]), tensor([-1.,  5.,  7.]))

    Reference:
        El-Yaniv, Wiener: On the Foundations of Noise-free Selective Classification, JMLR 2010.
    """

    higher_is_better = None
    axes = ("coverage", "risk")

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return coverage, risk and thresholds of all samples so far."""
        return selective.risk_coverage_curve_of_counts(self._counts())

    def _area(self) -> Tensor:
        return selective.aurc_of_counts(self._counts())
