"""The state that every meter of scores and targets shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_gradmetrics.meters.functional.counts import check_scores, check_target

__all__ = ["ScoreMeter"]


class ScoreMeter(Metric):
    """A meter of scores ``(N,)`` against targets ``(N,)`` that keeps every score.

    Subclasses say which function of all scores and targets they compute.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    scores: list[Tensor]
    target: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, target: Tensor) -> None:
        """Take a batch.

        Args:
            scores: ``(N,)``, higher = more uncertain, any scale and sign.
            target: ``(N,)``, 1 = an error or out-of-distribution, 0 = any other sample.

        Raises:
            ValueError: If a shape or a value is wrong, or a score is NaN.
        """
        scores = check_scores(scores)
        self.scores.append(scores)
        self.target.append(check_target(target, scores))

    def _all(self) -> tuple[Tensor, Tensor]:
        """All scores and targets so far, also if there are none."""
        if not isinstance(self.scores, Tensor) and not self.scores:
            return torch.zeros(0, device=self.device), torch.zeros(0, dtype=torch.bool, device=self.device)
        return dim_zero_cat(self.scores), dim_zero_cat(self.target).bool()

    def _call(self, function: Callable[..., Any], **kwargs: Any) -> Any:
        return function(*self._all(), **kwargs)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the value, or the values given, as torchmetrics' meters do.

        Args:
            val: A result, or a list of results over time; by default that of ``compute()``.
            ax: A matplotlib axis; by default a new figure.

        Returns:
            The figure and the axis.
        """
        return self._plot(val, ax)
