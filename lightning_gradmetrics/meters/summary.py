"""Meters that describe scores: distribution, calibration and rank correlation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from lightning_gradmetrics.meters import functional as F
from lightning_gradmetrics.meters.base import ScoreMeter
from lightning_gradmetrics.meters.functional.counts import check_scores, check_target, check_tensor
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
    """Count, mean, standard deviation and quantiles of a score.

    The functional form is :func:`~lightning_gradmetrics.meters.functional.distribution`.

    Args:
        quantiles: The quantiles to compute, in [0, 1].
        bins: ``None`` keeps every score (exact); a number of at least 1024 limits the memory, and each score is
            replaced by the middle of its cell.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Returns:
        ``compute()`` returns a dict of scalars: ``count``, ``non_finite``, ``mean``, ``std``, ``min``, ``max`` and
        ``q<percent>`` for each quantile; NaN with a UserWarning without finite scores.

    Raises:
        ValueError: If a quantile or ``bins`` is wrong, or a batch has a wrong shape.

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

    def update(self, preds: Tensor) -> None:  # type: ignore[override]
        """Add a batch.

        Args:
            preds: The scores ``(N,)``; NaN and infinities are counted as ``non_finite`` and otherwise ignored.
        """
        check_tensor(preds, "preds")
        finite = torch.isfinite(preds)
        finite_scores = check_scores(preds[finite] if preds.ndim == 1 else preds, "preds")
        self._take(finite_scores, torch.zeros(len(finite_scores), dtype=torch.bool, device=finite_scores.device))
        self.non_finite = self.non_finite + (~finite).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the distribution of all scores so far; undefined numbers are NaN with a UserWarning."""
        counts = self._counts()
        return distribution_of_counts(counts.scores, counts.negative, self.non_finite, self.quantiles)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot a histogram of the scores so far, or the range and quantiles of a given result.

        Args:
            val: A result of ``compute()``; by default, the stored scores.
            ax: A matplotlib axis; by default a new figure.

        Returns:
            The figure and the axis.
        """
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        if val is None:
            counts = self._counts()
            ax.hist(counts.scores.cpu(), bins=50, weights=counts.negative.cpu())
            ax.set_ylabel("samples")
        else:
            ax.plot([float(val["min"]), float(val["max"])], [0, 0], color="0.5")
            for name, value in val.items():
                if name.startswith("q"):
                    ax.plot([float(value)], [0], marker="|", markersize=20, linestyle="none", label=name)
            ax.set_yticks([])
            ax.legend()
        ax.set_xlabel("score")
        return ax.get_figure(), ax


class CalibrationError(ScoreMeter):
    """Expected calibration error of a probability, over equal-width bins.

    The functional form is :func:`~lightning_gradmetrics.meters.functional.calibration_error`.

    Args:
        n_bins: The number of bins.
        norm: ``"l1"`` the mean distance, ``"l2"`` the root mean square, ``"max"`` the largest.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Returns:
        ``compute()`` returns a scalar in [0, 1], lower is better; NaN with a UserWarning without samples.

    Raises:
        ValueError: If an argument is wrong, or a batch has a probability outside [0, 1].

    Example:
        >>> meter = CalibrationError()
        >>> meter.update(torch.tensor([0.1, 0.9, 0.9, 0.1]), torch.tensor([0, 1, 1, 0]))
        >>> meter.compute()
        tensor(0.1000)

    Reference:
        Naeini, Cooper, Hauskrecht: Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI 2015.
    """

    higher_is_better = False

    def __init__(self, n_bins: int = 15, norm: Norm = "l1", **kwargs: Any) -> None:
        super().__init__(None, **kwargs)
        self.n_bins, self.norm = check_n_bins(n_bins), check_norm(norm)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            preds: ``(N,)`` in [0, 1], the probability that the sample is positive.
            target: ``(N,)``, 1 = an error or out-of-distribution, 0 = any other sample.

        Raises:
            ValueError: If a probability is outside [0, 1], or a shape or a value is wrong.
        """
        probability = check_scores(preds, "preds")
        if bool((probability < 0).any() | (probability > 1).any()):
            raise ValueError("probabilities must be in [0, 1]: a raw score has no calibration")
        self._take(probability, check_target(target, probability))

    def compute(self) -> Tensor:
        """Return the calibration error of all samples so far; NaN with a UserWarning if there are none."""
        return F.calibration_error(*self._samples(), n_bins=self.n_bins, norm=self.norm)


class SpearmanCorrelation(ScoreMeter):
    """Spearman's rank correlation of every pair of scores.

    It stores every row and has no constant-memory mode, because pairs of scores need their joint ranks. The functional
    form is :func:`~lightning_gradmetrics.meters.functional.spearman`.

    Args:
        names: The scores' names, for the plot; by default their column numbers.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Returns:
        ``compute()`` returns ``(S, S)`` in [-1, 1]; NaN with a UserWarning for a constant score.

    Raises:
        ValueError: If a batch contains NaN, or a different number of columns than the names or an earlier batch.

    Example:
        >>> meter = SpearmanCorrelation(["entropy", "gradnorm"])
        >>> meter.update(torch.tensor([[1.0, -10.0], [2.0, -100.0], [3.0, -1000.0]]))
        >>> meter.compute()[0, 1]
        tensor(-1.)
    """

    higher_is_better = None

    def __init__(self, names: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(None, **kwargs)
        self.names = None if names is None else list(map(str, names))

    def update(self, preds: Tensor) -> None:  # type: ignore[override]
        """Add a batch.

        Args:
            preds: ``(N, S)``, one column per score.

        Raises:
            ValueError: If the shape differs from the names' or an earlier batch's, or a score is NaN.
        """
        check_tensor(preds, "preds")
        width = self._width()
        if preds.ndim != 2 or (width is not None and preds.shape[1] != width):
            raise ValueError(f"preds must have the shape (N, {width or 'S'}), got {tuple(preds.shape)}")
        self.scores.append(check_scores(preds.reshape(-1), "preds").reshape(preds.shape))

    def _width(self) -> int | None:
        """The number of scores; ``None`` before the first batch of a meter without names."""
        if self.names is not None:
            return len(self.names)
        return self.scores[0].shape[1] if len(self.scores) else None

    def compute(self) -> Tensor:
        """Return the correlations ``(S, S)`` of all rows so far; undefined ones are NaN with a UserWarning."""
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
        ax = plt.subplots()[1] if ax is None else ax
        names = self.names or list(map(str, range(len(values))))
        image = ax.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
        ax.set_yticks(range(len(names)), names)
        for row in range(len(names)):
            for column in range(len(names)):
                ax.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center")
        ax.get_figure().colorbar(image, ax=ax, label="Spearman's correlation")
        return ax.get_figure(), ax
