"""Probes that run a model on views and return its outputs, which several scores share, or the mean of one score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.input_gradients import check_floats
from lightning_gradmetrics.gradients.statistics import accumulator
from lightning_gradmetrics.scores.gradients import feature_norm
from lightning_gradmetrics.scores.logits import energy
from lightning_gradmetrics.scores.shifts import views_of
from lightning_gradmetrics.scoring import score as score_batch
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.registry import Score
from lightning_gradmetrics.scoring.scorer import Scorer
from lightning_gradmetrics.scoring.step import observed

__all__ = ["ViewMeans", "ViewOutputs", "Views", "reads_outputs", "view_evidence"]

Views = Callable[[Tensor], Sequence[Tensor]]
"""A function from inputs ``(N, ...)`` to views of the same shape."""


def reads_outputs(score: Score) -> bool:
    """Return whether a score reads nothing but the logits, the head and its input."""
    return not (score.needs.gradients or score.needs.probes)


@dataclass(frozen=True)
class ViewOutputs:
    """A probe: the logits and, if requested, the head's input of views, ``(N, V, C)`` or ``(N, V, C + D)``.

    The first of the default views, the input itself, is left out, because the forward pass of the prediction is
    observed.

    Args:
        n: The number of views.
        seed: The seed of the shifts.
        features: Whether to return the head's input.
        transforms: A function from inputs to views, or ``None`` for shifts and flips.
    """

    backward: ClassVar[bool] = False
    n: int
    seed: int
    features: bool
    transforms: Views | None

    @property
    def forwards(self) -> int | None:
        """The number of forward passes; ``None`` if the user's transforms determine it."""
        return self.n - 1 if self.transforms is None else None

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return the outputs."""
        scorer = Scorer((feature_norm() if self.features else energy(),))
        outputs = []
        for view in _views(inputs, self.n, self.seed, self.transforms):
            batch = observed(scorer, model, view.contiguous())
            seen = Evidence(batch.logits, batch.features)
            outputs.append(torch.cat([seen.logits, seen.features], 1) if self.features else seen.logits)
        return torch.stack(outputs, 1)


def view_evidence(probe: ViewOutputs, evidence: Evidence) -> list[Evidence]:
    """Return the evidence of each view; without transforms, that of the plain input first."""
    views = [evidence] if probe.transforms is None else []
    if probe.transforms is None and probe.n == 1:
        return views
    classes = evidence.logits.shape[1]
    width = classes + (evidence.features.shape[1] if probe.features else 0)
    for outputs in evidence.probe(probe, (max(1, probe.n - 1), width)).unbind(1):
        features = outputs[:, classes:] if probe.features else None
        views.append(
            Evidence(outputs[:, :classes], features, given_head=evidence.given_head, one_logit=evidence.one_logit)
        )
    return views


def _views(inputs: Any, n: int, seed: int, transforms: Views | None) -> Sequence[Tensor]:
    """Return the views that a probe runs."""
    check_floats(inputs, "augmented views")
    return views_of(inputs, n, seed)[1:] if transforms is None else transforms(inputs)


@dataclass(frozen=True, eq=False)
class ViewMeans:
    """A probe: the mean of a score over views ``(N,)``; without transforms, excluding the plain input.

    Args:
        score: The score.
        n: The number of views.
        seed: The seed of the shifts.
        transforms: A function from inputs to views, or ``None`` for shifts and flips.
    """

    score: Score
    n: int
    seed: int
    transforms: Views | None

    @property
    def backward(self) -> bool:
        """Whether the score takes a backward pass."""
        return self.score.needs.backward

    @property
    def forwards(self) -> int | None:
        """The number of forward passes; ``None`` if the user's transforms determine it."""
        each = self.score.needs.forwards
        return None if self.transforms is not None or each is None else (self.n - 1) * each

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return the mean over the views."""
        seen = _views(inputs, self.n, self.seed, self.transforms)
        total = torch.zeros((), device=inputs.device, dtype=accumulator(inputs))
        for view in seen:
            total = total + score_batch(model, view.contiguous(), self.score)[self.score.name]
        return total / len(seen)
