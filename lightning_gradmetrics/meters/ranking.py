"""Meters of how well scores rank positives above negatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.meters import functional as F
from lightning_gradmetrics.meters.base import CurveMeter, ScoreMeter
from lightning_gradmetrics.meters.functional import curves as C
from lightning_gradmetrics.meters.functional import ranking as R
from lightning_gradmetrics.meters.functional.counts import Positive, announce_undefined, check_rate, flip
from lightning_gradmetrics.meters.functional.histogram import auroc_bounds

__all__ = ["AUROC", "OSCR", "ROC", "AveragePrecision", "FPRAtTPR", "PrecisionRecallCurve"]


class AUROC(ScoreMeter):
    """Area under the ROC curve of scores of any scale; see :func:`~lightning_gradmetrics.meters.functional.auroc`.

    Example:
        >>> import torch
        >>> meter = AUROC()
        >>> meter.update(torch.tensor([20.0, 60.0]), torch.tensor([0, 1]))
        >>> meter.update(torch.tensor([-3.0, 20.0]), torch.tensor([0, 1]))
        >>> meter.compute()
        tensor(0.8750)
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The AUROC of all samples so far; NaN with a UserWarning if a class is missing."""
        if self.bins is None:
            return F.auroc(*self._samples())
        return announce_undefined(R.auroc_of_counts(self._counts()), "AUROC", R.BOTH)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest AUROC that all samples so far can have; equal in the exact mode."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            if self.bins is not None:
                return auroc_bounds(self.table)
            value = R.auroc_of_counts(self._counts())
            return value, value


class AveragePrecision(ScoreMeter):
    """Average precision of scores of any scale; see :func:`~lightning_gradmetrics.meters.functional.average_precision`.

    Args:
        positive: ``"out"`` (target 1) or ``"in"`` (target 0).
        bins: ``None`` for the exact mode, or a number for constant memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, positive: Positive = "out", bins: int | None = None, **kwargs: Any) -> None:
        super().__init__(bins, **kwargs)
        self.positive: Positive = R.check_positive(positive)

    def compute(self) -> Tensor:
        """The average precision of all samples so far; NaN with a UserWarning without a positive."""
        if self.bins is None:
            return F.average_precision(*self._samples(), positive=self.positive)
        value = R.average_precision_of_counts(self._counts(), self.positive)
        return announce_undefined(value, "average precision", "a positive sample")


class FPRAtTPR(ScoreMeter):
    """False-positive rate at a true-positive rate; see :func:`~lightning_gradmetrics.meters.functional.fpr_at_tpr`.

    Args:
        rate: The true-positive rate, in (0, 1].
        positive: ``"out"`` (target 1) or ``"in"`` (target 0).
        bins: ``None`` for the exact mode, or a number for constant memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = False

    def __init__(self, rate: float = 0.95, positive: Positive = "out", bins: int | None = None, **kwargs: Any) -> None:
        super().__init__(bins, **kwargs)
        self.rate = check_rate(rate, "rate")
        self.positive: Positive = R.check_positive(positive)

    def compute(self) -> Tensor:
        """The false-positive rate of all samples so far; NaN with a UserWarning if a class is missing."""
        value = R.fpr_at_tpr_of_counts(self._counts(), self.rate, self.positive)
        return announce_undefined(value, f"FPR at {self.rate:g} TPR", R.BOTH)


class OSCR(ScoreMeter):
    """Open-set classification rate; see :func:`~lightning_gradmetrics.meters.functional.oscr`.

    In-distribution samples that are classified wrongly are counted and not kept.

    Args:
        bins: ``None`` for the exact mode, or a number for constant memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = True
    wrong: Tensor

    def __init__(self, bins: int | None = None, **kwargs: Any) -> None:
        super().__init__(bins, **kwargs)
        self.add_state("wrong", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scores: Tensor, target: Tensor, correct: Tensor) -> None:  # type: ignore[override]
        """Take a batch.

        Args:
            scores: ``(N,)``, higher = more uncertain, any scale and sign; infinities rank, NaN is refused.
            target: ``(N,)``, 1 = out-of-distribution, 0 = in-distribution.
            correct: ``(N,)``, 1 = the prediction is right; it is not used where the target is 1.
        """
        kept, outside, wrong = F.oscr_samples(scores, target, correct)
        self._take(kept, outside)
        self.wrong = self.wrong + wrong

    def compute(self) -> Tensor:
        """The OSCR of all samples so far; NaN with a UserWarning if a class is missing."""
        return announce_undefined(R.oscr_of_counts(self._counts(), self.wrong), "OSCR", R.BOTH)


class ROC(CurveMeter):
    """The ROC curve of scores of any scale; see :func:`~lightning_gradmetrics.meters.functional.roc`."""

    higher_is_better = None
    axes = ("false-positive rate", "true-positive rate")

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """False-positive rates, true-positive rates and thresholds of all samples so far."""
        return F.roc(*self._samples()) if self.bins is None else C.roc_of_counts(self._counts())


class PrecisionRecallCurve(CurveMeter):
    """Precision and recall of scores; see :func:`~lightning_gradmetrics.meters.functional.precision_recall_curve`.

    Args:
        positive: ``"out"`` (target 1) or ``"in"`` (target 0).
        bins: ``None`` for the exact mode, or a number for constant memory.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = None
    axes = ("recall", "precision")

    def __init__(self, positive: Positive = "out", bins: int | None = None, **kwargs: Any) -> None:
        super().__init__(bins, **kwargs)
        self.positive: Positive = R.check_positive(positive)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Precision, recall and thresholds of all samples so far."""
        if self.bins is None:
            return F.precision_recall_curve(*self._samples(), positive=self.positive)
        if self.positive == "out":
            return C.precision_recall_curve_of_counts(self._counts())
        precision, recall, thresholds = C.precision_recall_curve_of_counts(flip(self._counts()))
        return precision, recall, -thresholds

    def _drawn(self, curve: Any) -> Any:
        return curve[1], curve[0], curve[2]
