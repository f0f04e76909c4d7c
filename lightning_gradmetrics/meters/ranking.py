"""Meters of how well scores rank positives above negatives."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_gradmetrics.meters import functional as F
from lightning_gradmetrics.meters.base import ScoreMeter
from lightning_gradmetrics.meters.functional.counts import Positive, check_rate
from lightning_gradmetrics.meters.functional.ranking import check_positive

__all__ = ["AUROC", "AveragePrecision", "FPRAtTPR"]


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
        """The AUROC of all samples so far."""
        return self._call(F.auroc)  # type: ignore[no-any-return]


class AveragePrecision(ScoreMeter):
    """Average precision of scores of any scale; see :func:`~lightning_gradmetrics.meters.functional.average_precision`.

    Args:
        positive: ``"out"`` (target 1) or ``"in"`` (target 0).
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, positive: Positive = "out", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.positive: Positive = check_positive(positive)

    def compute(self) -> Tensor:
        """The average precision of all samples so far."""
        return self._call(F.average_precision, positive=self.positive)  # type: ignore[no-any-return]


class FPRAtTPR(ScoreMeter):
    """False-positive rate at a true-positive rate; see :func:`~lightning_gradmetrics.meters.functional.fpr_at_tpr`.

    Args:
        rate: The true-positive rate, in (0, 1].
        positive: ``"out"`` (target 1) or ``"in"`` (target 0).
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = False

    def __init__(self, rate: float = 0.95, positive: Positive = "out", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate = check_rate(rate, "rate")
        self.positive: Positive = check_positive(positive)

    def compute(self) -> Tensor:
        """The false-positive rate of all samples so far."""
        return self._call(F.fpr_at_tpr, rate=self.rate, positive=self.positive)  # type: ignore[no-any-return]
