"""Meters that measure how well scores rank positives above negatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.meters.base import CurveMeter, ScoreMeter
from lightning_gradmetrics.meters.functional import curves, ranking
from lightning_gradmetrics.meters.functional.bounds import auroc_bounds
from lightning_gradmetrics.meters.functional.counts import Positive, announce_undefined, check_rate, check_tensor
from lightning_gradmetrics.meters.functional.ranking import oscr_samples

__all__ = ["AUROC", "OSCR", "ROC", "AveragePrecision", "FPRAtTPR", "PrecisionRecallCurve"]


class AUROC(ScoreMeter):
    """Area under the ROC curve: the probability that a positive scores above a negative, with ties counted as one half.

    Raw scores of any scale and sign are ranked as given, not squashed into [0, 1]. The functional form is
    :func:`~lightning_gradmetrics.meters.functional.auroc`.

    Args:
        bins: ``None`` keeps every score (exact); a number of at least 1024 limits the memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Returns:
        ``compute()`` returns a scalar in [0, 1], higher is better; NaN with a UserWarning if a class is missing.

    Raises:
        ValueError: If ``bins`` is wrong, or a batch has a wrong shape, a NaN, or a target that is neither 0 nor 1.

    Example:
        >>> import torch
        >>> meter = AUROC()
        >>> meter.update(torch.tensor([20.0, 60.0]), torch.tensor([0, 1]))
        >>> meter.update(torch.tensor([-3.0, 20.0]), torch.tensor([0, 1]))
        >>> meter.compute()
        tensor(0.8750)

    Reference:
        Hanley, McNeil: The Meaning and Use of the Area under a Receiver Operating Characteristic (ROC) Curve,
        Radiology 1982.
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """Return the AUROC of all samples so far; NaN with a UserWarning if a class is missing."""
        return announce_undefined(ranking.auroc_of_counts(self._counts()), "AUROC", ranking.BOTH)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest AUROC that the samples so far can have; they are equal in the exact mode."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            if self.bins is not None:
                return auroc_bounds(self.table)
            value = ranking.auroc_of_counts(self._counts())
            return value, value


class AveragePrecision(ScoreMeter):
    """Average precision, the area under the precision-recall curve: ``sum_k (R_k - R_{k-1}) P_k``.

    The functional form is :func:`~lightning_gradmetrics.meters.functional.average_precision`.

    Args:
        positive: ``"out"`` (target 1 is positive) or ``"in"`` (target 0 is positive).
        bins: ``None`` keeps every score (exact); a number of at least 1024 limits the memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Returns:
        ``compute()`` returns a scalar in [0, 1], higher is better; NaN with a UserWarning without a positive.

    Raises:
        ValueError: If an argument is wrong, or a batch has a wrong shape, a NaN, or a target that is neither 0 nor 1.

    Example:
        >>> import torch
        >>> meter = AveragePrecision()
        >>> meter.update(torch.tensor([20.0, 60.0, -3.0]), torch.tensor([1, 0, 0]))
        >>> meter.compute()
        tensor(0.5000)

    Reference:
        Davis, Goadrich: The Relationship between Precision-Recall and ROC Curves, ICML 2006.
    """

    higher_is_better = True

    def __init__(self, positive: Positive = "out", bins: int | None = None, **kwargs: Any) -> None:
        super().__init__(bins, **kwargs)
        self.positive: Positive = ranking.check_positive(positive)

    def compute(self) -> Tensor:
        """Return the average precision of all samples so far; NaN with a UserWarning without a positive."""
        value = ranking.average_precision_of_counts(self._counts(), self.positive)
        return announce_undefined(value, "average precision", "a positive sample")


class FPRAtTPR(ScoreMeter):
    """Lowest false-positive rate of all thresholds whose true-positive rate is at least ``rate``.

    FPR95 is ``FPRAtTPR(0.95)``. The functional form is :func:`~lightning_gradmetrics.meters.functional.fpr_at_tpr`.

    Args:
        rate: The true-positive rate, in (0, 1].
        positive: ``"out"`` (target 1 is positive) or ``"in"`` (target 0 is positive).
        bins: ``None`` keeps every score (exact); a number of at least 1024 limits the memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Returns:
        ``compute()`` returns a scalar in [0, 1], lower is better; NaN with a UserWarning if a class is missing.

    Raises:
        ValueError: If an argument is wrong, or a batch has a wrong shape, a NaN, or a target that is neither 0 nor 1.

    Example:
        >>> import torch
        >>> meter = FPRAtTPR(rate=1.0)
        >>> meter.update(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 1, 0, 1]))
        >>> meter.compute()
        tensor(0.5000)

    Reference:
        Liang, Li, Srikant: Enhancing the Reliability of Out-of-Distribution Image Detection, ICLR 2018.
    """

    higher_is_better = False

    def __init__(self, rate: float = 0.95, positive: Positive = "out", bins: int | None = None, **kwargs: Any) -> None:
        super().__init__(bins, **kwargs)
        self.rate = check_rate(rate, "rate")
        self.positive: Positive = ranking.check_positive(positive)

    def compute(self) -> Tensor:
        """Return the false-positive rate of all samples so far; NaN with a UserWarning if a class is missing."""
        value = ranking.fpr_at_tpr_of_counts(self._counts(), self.rate, self.positive)
        return announce_undefined(value, f"FPR at {self.rate:g} TPR", ranking.BOTH)


class OSCR(ScoreMeter):
    """Open-set classification rate: area under the correct-classification rate over the false-positive rate.

    Incorrect in-distribution samples are counted and not stored. The functional form is
    :func:`~lightning_gradmetrics.meters.functional.oscr`.

    Args:
        bins: ``None`` keeps every score (exact); a number of at least 1024 limits the memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Returns:
        ``compute()`` returns a scalar between 0 and the accuracy, higher is better; NaN with a UserWarning if a class
        is missing.

    Raises:
        ValueError: If ``bins`` is wrong, or a batch has a wrong shape, a NaN, or a target that is neither 0 nor 1.

    Example:
        >>> import torch
        >>> meter = OSCR()
        >>> meter.update(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 0, 0]))
        >>> meter.compute()
        tensor(0.5000)

    Reference:
        Dhamija, Guenther, Boult: Reducing Network Agnostophobia, NeurIPS 2018.
    """

    higher_is_better = True
    incorrect: Tensor

    def __init__(self, bins: int | None = None, **kwargs: Any) -> None:
        super().__init__(bins, **kwargs)
        self.add_state("incorrect", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, correct: Tensor) -> None:  # type: ignore[override]
        """Add a batch.

        Args:
            preds: The scores ``(N,)``, higher = more uncertain, any scale and sign, including infinities; NaN is
                refused.
            target: ``(N,)``, 1 = out-of-distribution, 0 = in-distribution.
            correct: ``(N,)``, 1 = the prediction is correct; ignored if the target is 1.
        """
        check_tensor(preds, "preds")
        ranked_scores, is_ood, incorrect = oscr_samples(preds, target, correct)
        self._take(ranked_scores, is_ood)
        self.incorrect = self.incorrect + incorrect

    def compute(self) -> Tensor:
        """Return the OSCR of all samples so far; NaN with a UserWarning if a class is missing."""
        return announce_undefined(ranking.oscr_of_counts(self._counts(), self.incorrect), "OSCR", ranking.BOTH)


class ROC(CurveMeter):
    """The ROC curve: one point per distinct score, in the unit of the scores.

    The functional form is :func:`~lightning_gradmetrics.meters.functional.roc`.

    Args:
        bins: ``None`` keeps every score (exact); a number of at least 1024 limits the memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Returns:
        ``compute()`` returns false-positive rates, true-positive rates and thresholds, ``(G + 1,)`` each. The rates of a
        missing class are NaN, with a UserWarning.

    Raises:
        ValueError: If ``bins`` is wrong, or a batch has a wrong shape, a NaN, or a target that is neither 0 nor 1.

    Example:
        >>> import torch
        >>> meter = ROC()
        >>> meter.update(torch.tensor([20.0, 60.0, -3.0]), torch.tensor([0, 1, 0]))
        >>> meter.compute()
        (tensor([0.0000, 0.0000, 0.5000, 1.0000]), tensor([0., 1., 1., 1.]), tensor([inf, 60., 20., -3.]))

    Reference:
        Fawcett: An Introduction to ROC Analysis, Pattern Recognition Letters 2006.
    """

    higher_is_better = None
    axes = ("false-positive rate", "true-positive rate")

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return false-positive rates, true-positive rates and thresholds of all samples so far."""
        return curves.roc_of_counts(self._counts())

    def _area(self) -> Tensor:
        return ranking.auroc_of_counts(self._counts())

    def _decorate(self, ax: Any) -> None:
        """Draw the diagonal, which is the curve of random guessing."""
        ax.plot([0, 1], [0, 1], linestyle=":", color="0.5", linewidth=1)


class PrecisionRecallCurve(CurveMeter):
    """The precision-recall curve: one point per distinct score, and the end point (1, 0) without a threshold.

    The functional form is :func:`~lightning_gradmetrics.meters.functional.precision_recall_curve`.

    Args:
        positive: ``"out"`` (target 1 is positive) or ``"in"`` (target 0 is positive).
        bins: ``None`` keeps every score (exact); a number of at least 1024 limits the memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Returns:
        ``compute()`` returns precision and recall, ``(G + 1,)`` each, and thresholds ``(G,)``. Without a positive the
        recall is NaN, with a UserWarning.

    Raises:
        ValueError: If an argument is wrong, or a batch has a wrong shape, a NaN, or a target that is neither 0 nor 1.

    Example:
        >>> import torch
        >>> meter = PrecisionRecallCurve()
        >>> meter.update(torch.tensor([20.0, 60.0, -3.0]), torch.tensor([0, 1, 0]))
        >>> meter.compute()
        (tensor([0.3333, 0.5000, 1.0000, 1.0000]), tensor([1., 1., 1., 0.]), tensor([-3., 20., 60.]))

    Reference:
        Davis, Goadrich: The Relationship between Precision-Recall and ROC Curves, ICML 2006.
    """

    higher_is_better = None
    axes = ("recall", "precision")

    def __init__(self, positive: Positive = "out", bins: int | None = None, **kwargs: Any) -> None:
        super().__init__(bins, **kwargs)
        self.positive: Positive = ranking.check_positive(positive)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return precision, recall and thresholds of all samples so far."""
        return curves.precision_recall_curve_of_counts(self._counts(), self.positive)

    def _area(self) -> Tensor:
        return ranking.average_precision_of_counts(self._counts(), self.positive)

    def _drawn(self, curve: Any) -> Any:
        return curve[1], curve[0], curve[2]
