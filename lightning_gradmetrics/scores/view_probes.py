"""Probes that run a model on views: probes that read outputs share one pass per view; one returns a score's mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import batch_size, preserved
from lightning_gradmetrics.classifier.input_gradients import check_floats
from lightning_gradmetrics.engine.api import eager
from lightning_gradmetrics.gradients.statistics import accumulator
from lightning_gradmetrics.scores.channels import observing_channels, weighted_layers
from lightning_gradmetrics.scores.gradients import feature_norm
from lightning_gradmetrics.scores.logits import energy
from lightning_gradmetrics.scores.shifts import views_of
from lightning_gradmetrics.scoring import score as score_batch
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.registry import Score
from lightning_gradmetrics.scoring.scorer import Scorer
from lightning_gradmetrics.scoring.step import observed

__all__ = [
    "SeenView",
    "ViewMeans",
    "ViewOutputs",
    "ViewProbe",
    "ViewSet",
    "Views",
    "reads_outputs",
    "view_evidence",
]

Views = Callable[[Tensor], Sequence[Tensor]]
"""A function from inputs ``(N, ...)`` to views of the same shape."""


def reads_outputs(score: Score) -> bool:
    """Return whether a score reads nothing but the logits, the head and its input."""
    return not (score.needs.gradients or score.needs.probes)


@dataclass(frozen=True)
class SeenView:
    """What is observed in one forward pass on a view.

    Args:
        evidence: The logits and, if a probe reads it, the head's input.
        channels: The channel statistics ``(N, F)`` if a probe reads them.
    """

    evidence: Evidence
    channels: Tensor | None


class ViewProbe(ABC):
    """The base of probes that read forward passes on views: probes with the same views share one pass per view."""

    backward: ClassVar[bool] = False
    views: ViewSet
    features: bool
    channels: bool = False

    @abstractmethod
    def of_view(self, seen: SeenView) -> Tensor:
        """Return what the probe reads from one view, ``(N, ...)``."""

    @abstractmethod
    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """Return the probe's result from what it reads from each view."""

    def layers_read(self, model: nn.Module) -> list[nn.Module]:
        """Return the layers whose inputs are read."""
        return weighted_layers(model) if self.channels else []

    @property
    def passes(self) -> ViewSet:
        """Probes with equal passes are computed together."""
        return self.views

    @property
    def forwards(self) -> int | None:
        """The number of forward passes; ``None`` if the user's transforms determine it."""
        return self.views.forwards

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return the result."""
        return self.together([self], model, inputs)[self]

    @staticmethod
    def together(probes: Sequence[ViewProbe], model: nn.Module, inputs: Any) -> dict[ViewProbe, Tensor]:
        """Return the results of several probes with the same views by one forward pass per view."""
        features = any(probe.features for probe in probes)
        channels = any(probe.channels for probe in probes)
        read: dict[ViewProbe, list[Tensor]] = {probe: [] for probe in probes}
        with preserved(model), torch.no_grad(), eager():
            for view in probes[0].views.of(inputs):
                observed_view = _seen(model, view.contiguous(), features, channels)
                for probe, values in read.items():
                    values.append(probe.of_view(observed_view))
        return {probe: probe.joined(values) for probe, values in read.items()}


def _seen(model: nn.Module, view: Tensor, features: bool, channels: bool) -> SeenView:
    """Run the model on one view."""
    scorer = Scorer((feature_norm() if features else energy(),))
    with ExitStack() as stack:
        observer = stack.enter_context(observing_channels(model, batch_size(view))) if channels else None
        batch = observed(scorer, model, view)
    return SeenView(Evidence(batch.logits, batch.features), None if observer is None else observer.columns)


@dataclass(frozen=True)
class ViewSet:
    """The views that probes run.

    Args:
        n: The number of default views, the input itself included.
        seed: The seed of the shifts.
        flip: Whether every other default view is flipped.
        transforms: From inputs to views, or ``None`` for shifts and flips.
    """

    n: int
    seed: int
    flip: bool = True
    transforms: Views | None = None

    @property
    def forwards(self) -> int | None:
        """The number of forward passes; ``None`` if the user's transforms determine it."""
        return self.n - 1 if self.transforms is None else None

    def of(self, inputs: Any) -> Sequence[Tensor]:
        """Return the views of inputs; without transforms the first, the input itself, is left out."""
        check_floats(inputs, "augmented views")
        if self.transforms is not None:
            return self.transforms(inputs)
        return views_of(inputs, self.n, self.seed, self.flip)[1:]


@dataclass(frozen=True)
class ViewOutputs(ViewProbe):
    """A probe: the logits and, if requested, the head's input of views, ``(N, V, C)`` or ``(N, V, C + D)``.

    The first of the default views, the input itself, is left out: the forward pass that makes the prediction is observed.

    Args:
        views: The views.
        features: Whether to return the head's input.
    """

    views: ViewSet
    features: bool

    def of_view(self, seen: SeenView) -> Tensor:
        """Return the outputs of one view."""
        if not self.features:
            return seen.evidence.logits
        return torch.cat([seen.evidence.logits, seen.evidence.features], 1)

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """Return the outputs of all views."""
        return torch.stack(list(values), 1)


def view_evidence(probe: ViewOutputs, evidence: Evidence) -> list[Evidence]:
    """Return the evidence of each view: without transforms, the plain input's first."""
    is_default = probe.views.transforms is None
    views = [evidence] if is_default else []
    if is_default and probe.views.n == 1:
        return views
    classes = evidence.logits.shape[1]
    width = classes + (evidence.features.shape[1] if probe.features else 0)
    for outputs in evidence.probe(probe, (max(1, probe.views.n - 1), width)).unbind(1):
        features = outputs[:, classes:] if probe.features else None
        views.append(
            Evidence(outputs[:, :classes], features, given_head=evidence.given_head, one_logit=evidence.one_logit)
        )
    return views


@dataclass(frozen=True, eq=False)
class ViewMeans:
    """A probe: the mean of a score over views ``(N,)``; without transforms, excluding the plain input.

    Args:
        score: The score.
        views: The views.
    """

    score: Score
    views: ViewSet

    @property
    def backward(self) -> bool:
        """Whether the score takes a backward pass."""
        return self.score.needs.backward

    @property
    def forwards(self) -> int | None:
        """The number of forward passes; ``None`` if the user's transforms determine it."""
        views, each = self.views.forwards, self.score.needs.forwards
        return None if views is None or each is None else views * each

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return the mean over the views."""
        evidence_of_views = self.views.of(inputs)
        total = torch.zeros((), device=inputs.device, dtype=accumulator(inputs))
        for view in evidence_of_views:
            total = total + score_batch(model, view.contiguous(), self.score)[self.score.name]
        return total / len(evidence_of_views)
