"""The common part of all exports: a score that is fitted on batches and computed on inputs of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightning_gradmetrics.scores import FittedScore
from lightning_gradmetrics.scoring.direct import score as score_batch
from lightning_gradmetrics.scoring.fitting import fit
from lightning_gradmetrics.scoring.registry import ScoreLike, make

__all__ = ["BoundScore"]


class BoundScore:
    """A score for models; its state belongs to the model that it was last fitted for.

    Args:
        score: The score.
        options: ``head``, ``logits_fn`` and ``engine``, as in :func:`lightning_gradmetrics.score`.

    Raises:
        ValueError: If the score needs true labels, which other libraries do not pass.

    Example:
        >>> bound = BoundScore("energy", {})
        >>> bound.values(nn.Linear(2, 3), nn.Linear(2, 2).weight).shape
        torch.Size([2])
    """

    def __init__(self, score: ScoreLike, options: dict[str, Any]) -> None:
        self.score = make(score)
        if self.score.needs.labels:
            raise ValueError(f"{self.score.name!r} needs true labels, which other libraries do not pass to a detector")
        self.options = options

    @property
    def requires_fit(self) -> bool:
        """Whether the score is a fitted score."""
        return isinstance(self.score, FittedScore)

    @property
    def is_ready(self) -> bool:
        """Whether the score needs no fit or has a state."""
        return not isinstance(self.score, FittedScore) or self.score.state is not None

    def fit(self, model: nn.Module, batches: Iterable[Any]) -> None:
        """Fit the score on in-distribution batches; does nothing if it needs no fit."""
        if isinstance(self.score, FittedScore):
            (self.score,) = fit(model, batches, self.score, **self.options)

    def values(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return the uncertainties ``(N,)``."""
        return score_batch(model, inputs, self.score, **self.options)[self.score.name]
