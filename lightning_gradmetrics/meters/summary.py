"""Meters of what scores are like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from lightning_gradmetrics.meters import functional as F
from lightning_gradmetrics.meters.base import ScoreMeter
from lightning_gradmetrics.meters.functional.counts import check_scores, check_target
from lightning_gradmetrics.meters.functional.summary import (
    QUANTILES,
    Norm,
    check_n_bins,
    check_norm,
    check_quantiles,
    distribution_of_counts,
)

__all__ = ["CalibrationError", "ScoreDistribution", "SpearmanCorrelation"]


class ScoreDistribution(ScoreMeter):
    """Count, mean, spread and quantiles of a score; see :func:`~lightning_gradmetrics.meters.functional.distribution`.

    Args:
        quantiles: Which quantiles, in [0, 1].
        bins: ``None`` for the exact mode, or a number for constant memory, where a score counts as the middle of its
            cell.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> meter = ScoreDistribution()
        >>> meter.update(torch.tensor([1.0, 3.0, torch.nan]))
        >>> {name: value.item() for name, value in meter.compute().items() if name in ("count", "non_finite", "mean")}
        {'count': 2, 'non_finite': 1, 'mean': 2.0}
    """

    higher_is_better = None
    plot_lower_bound = None
    plot_upper_bound = None
    non_finite: Tensor

    def __init__(self, quantiles: Sequence[float] = QUANTILES, bins: int | None = None, **kwargs: Any) -> None:
        super().__init__(bins, **kwargs)
        self.quantiles = check_quantiles(quantiles)
        self.add_state("non_finite", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scores: Tensor) -> None:  # type: ignore[override]
        """Take a batch.

        Args:
            scores: ``(N,)``; NaN and infinities are counted apart.
        """
        finite = torch.isfinite(scores)
        kept = check_scores(scores[finite])
        self._take(kept, torch.zeros(len(kept), dtype=torch.bool, device=kept.device))
        self.non_finite = self.non_finite + (~finite).sum()

    def compute(self) -> dict[str, Tensor]:
        """The numbers of all scores so far; NaN with a UserWarning where they are undefined."""
        counts = self._counts()
        return distribution_of_counts(counts.scores, counts.negative, self.non_finite, self.quantiles)


class CalibrationError(ScoreMeter):
    """Calibration error of a probability; see :func:`~lightning_gradmetrics.meters.functional.calibration_error`.

    Args:
        n_bins: The number of bins.
        norm: ``"l1"``, ``"l2"`` or ``"max"``.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = False

    def __init__(self, n_bins: int = 15, norm: Norm = "l1", **kwargs: Any) -> None:
        super().__init__(None, **kwargs)
        self.n_bins, self.norm = check_n_bins(n_bins), check_norm(norm)

    def update(self, probability: Tensor, target: Tensor) -> None:
        """Take a batch.

        Args:
            probability: ``(N,)`` in [0, 1], the chance that the sample is positive.
            target: ``(N,)``, 1 = an error or out-of-distribution, 0 = any other sample.

        Raises:
            ValueError: If a probability is outside [0, 1], or a shape or a value is wrong.
        """
        probability = check_scores(probability, "probability")
        if bool((probability < 0).any() | (probability > 1).any()):
            raise ValueError("a probability must lie in [0, 1]: a raw score has no calibration")
        self._take(probability, check_target(target, probability))

    def compute(self) -> Tensor:
        """The calibration error of all samples so far; NaN with a UserWarning if there are none."""
        return F.calibration_error(*self._samples(), n_bins=self.n_bins, norm=self.norm)


class SpearmanCorrelation(ScoreMeter):
    """Rank correlation between scores; see :func:`~lightning_gradmetrics.meters.functional.spearman`.

    It keeps every row: ranks of pairs need the pairs, so there is no constant-memory mode.

    Args:
        names: The scores' names, for the plot; by default their column numbers.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> meter = SpearmanCorrelation(["entropy", "gradnorm"])
        >>> meter.update(torch.tensor([[1.0, -10.0], [2.0, -100.0], [3.0, -1000.0]]))
        >>> meter.compute()[0, 1]
        tensor(-1.)
    """

    higher_is_better = None

    def __init__(self, names: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(None, **kwargs)
        self.names = None if names is None else [str(name) for name in names]

    def update(self, scores: Tensor) -> None:  # type: ignore[override]
        """Take a batch.

        Args:
            scores: ``(N, S)``, a column a score.

        Raises:
            ValueError: If the shape differs from the names' or an earlier batch's, or a score is NaN.
        """
        width = len(self.names) if self.names is not None else self.scores[0].shape[1] if self.scores else None
        if scores.ndim != 2 or (width is not None and scores.shape[1] != width):
            raise ValueError(f"scores must have the shape (N, {width or 'S'}), got {tuple(scores.shape)}")
        self.scores.append(check_scores(scores.reshape(-1)).reshape(scores.shape))

    def compute(self) -> Tensor:
        """``(S, S)``, the correlations of all rows so far; NaN with a UserWarning where they are undefined."""
        width = len(self.names or [])
        return F.spearman(dim_zero_cat(self.scores) if len(self.scores) else torch.zeros(0, width))

    def plot(self, val: Tensor | None = None, ax: Any = None) -> Any:
        """Plot the correlations as a labelled heat map.

        Args:
            val: A result of ``compute()``; by default computed now.
            ax: A matplotlib axis; by default a new figure.

        Returns:
            The figure and the axis.
        """
        import matplotlib.pyplot as plt

        values = (val if val is not None else self.compute()).cpu().numpy()
        fig, ax = (ax.get_figure(), ax) if ax is not None else plt.subplots()
        names = self.names or [str(column) for column in range(len(values))]
        image = ax.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
        ax.set_yticks(range(len(names)), names)
        for (row, column), value in [((i, j), values[i, j]) for i in range(len(names)) for j in range(len(names))]:
            ax.text(column, row, f"{value:.2f}", ha="center", va="center")
        fig.colorbar(image, ax=ax, label="Spearman's correlation")
        return fig, ax
