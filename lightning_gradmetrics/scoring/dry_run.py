"""The dry run: calls a score on two synthetic samples to record which evidence it needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.head_features import HeadFeatures
from lightning_gradmetrics.gradients.objectives import Loss, Objective
from lightning_gradmetrics.gradients.statistics import Moment, moments_for
from lightning_gradmetrics.scoring.evidence import (
    Evidence,
    Gradient,
    ObservableProbe,
    ParameterGradients,
    Probe,
    Target,
    TextProbe,
    by_passes,
)

__all__ = ["Needs", "needs_of"]

Requests = dict[Target, dict[Objective, set[Moment]]]


def _no_requests() -> dict[Objective, set[Moment]]:
    return defaultdict(set)


def _no_targets() -> Requests:
    return defaultdict(_no_requests)


@dataclass
class Needs:
    """The evidence that scores request.

    Args:
        features: Whether they need the head's input.
        labels: Whether they need true labels.
        ood: Whether they need to know which samples are out-of-distribution.
        head_gradient: Whether they need a gradient of the head, which takes no backward pass.
        gradients: For each other target, the objectives and the moments of their gradients.
        probes: The scores' own computations on the model.
    """

    features: bool = False
    labels: bool = False
    ood: bool = False
    head_gradient: bool = False
    gradients: Requests = field(default_factory=_no_targets)
    probes: list[Probe] = field(default_factory=list)

    @property
    def of_texts(self) -> bool:
        """Whether the score has one value per text of a batch of texts: true if it needs gradients of the network or hidden states."""
        return bool(self.gradients) or any(isinstance(probe, TextProbe) for probe in self.probes)

    @property
    def backward(self) -> bool:
        """Whether a backward pass through the network is needed. A probe takes one unless its ``backward`` is false."""
        return bool(self.gradients) or any(getattr(probe, "backward", True) for probe in self.probes)

    @property
    def forwards(self) -> int | None:
        """The number of forward passes, including the one for the prediction; ``None`` if it is unknown.

        A gradient of parameters before the head takes one more. A probe takes one, or its ``forwards``; probes with equal
        ``passes`` share theirs.
        """
        total = 1 + bool(self.gradients)
        for first, _ in by_passes(self.reruns):
            count = getattr(first, "forwards", 1)
            if count is None:
                return None
            total += count
        return total

    @property
    def observable(self) -> list[ObservableProbe]:
        """The probes whose results hooks can compute during the forward pass of the prediction."""
        return [probe for probe in self.probes if isinstance(probe, ObservableProbe)]

    @property
    def reruns(self) -> list[Probe]:
        """The probes that run the model again."""
        return [probe for probe in self.probes if not isinstance(probe, ObservableProbe)]


class _RecordedGradient(ParameterGradients):
    """A synthetic gradient that records the requested moments."""

    def __init__(self, moments: set[Moment], shape: tuple[int, ...]) -> None:
        self.moments, self.shape = moments, shape

    def statistic(self, name: str) -> Tensor:
        self.moments |= moments_for([name])
        return torch.ones(self.shape)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"layer.{i}" for i in range(self.shape[1]))

    def by_layer(self) -> _RecordedGradient:
        return self

    def merged(self) -> _RecordedGradient:
        return _RecordedGradient(self.moments, self.shape[:1])


class _Recorder(Evidence):
    """Evidence of two synthetic samples that records what a score requests."""

    def __init__(self, needs: Needs, classes: int) -> None:
        logits, labels = torch.linspace(-1, 1, 2 * classes).view(2, classes), torch.zeros(2, dtype=torch.long)
        head = (torch.ones(classes, 3), torch.zeros(classes))
        super().__init__(logits, torch.ones(2, 3), labels, torch.tensor([False, True]), given_head=head)
        self.needs = needs

    @property
    def features(self) -> Tensor:
        self.needs.features = True
        return super().features

    @property
    def head_input(self) -> HeadFeatures:
        self.needs.features = True
        return super().head_input

    @property
    def layer_input(self) -> HeadFeatures:
        self.needs.features = True
        return super().layer_input

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        classes = self.given_logits.shape[1]
        return torch.ones(classes, self.features.shape[1]), torch.zeros(classes)

    @property
    def labels(self) -> Tensor:
        self.needs.labels = True
        return super().labels

    @property
    def ood(self) -> Tensor:
        self.needs.ood = True
        return super().ood

    def gradient(self, objective: str | Loss | Objective, target: Target = "head", **arguments: Any) -> Gradient:
        objective = Objective.of(objective, **arguments)
        if target == "head":
            self.needs.head_gradient = True
            return super().gradient(objective, target)
        return self._requested(objective, target, (2,))

    def gradient_per_parameter(
        self, objective: str | Loss | Objective, target: Target = "all", **arguments: Any
    ) -> ParameterGradients:
        objective = Objective.of(objective, **arguments)
        if target == "head":
            self.needs.head_gradient = True
            return super().gradient_per_parameter(objective, target)
        return self._requested(objective, target, (2, 4))

    def _requested(self, objective: Objective, target: Target, shape: tuple[int, ...]) -> _RecordedGradient:
        self.needs.labels |= objective.needs_targets
        return _RecordedGradient(self.needs.gradients[target][objective], shape)

    def probe(self, function: Probe, shape: tuple[int, ...] = ()) -> Tensor:
        if function not in self.needs.probes:
            self.needs.probes.append(function)
        return torch.ones(2, *shape)


def needs_of(scores: Iterable[Callable[[Evidence], Any]], classes: int = 3) -> Needs:
    """Return the evidence that scores request, recorded in a dry run of each score on two synthetic samples.

    Scores do not declare their needs. The dry run of a fitted score calls its ``look``, which needs no state.

    Args:
        scores: Scores, or other functions of the evidence.
        classes: The number of classes of the synthetic samples.

    Example:
        >>> from lightning_gradmetrics.scoring.registry import make
        >>> needs_of([make("gradnorm"), make("entropy")]).features
        True
    """
    needs = Needs()
    for score in scores:
        getattr(score, "look", score)(_Recorder(needs, classes))
    return needs
