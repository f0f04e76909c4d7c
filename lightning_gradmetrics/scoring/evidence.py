"""Evidence: what a score may look at, and the dry run that finds out what it does look at."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_gradmetrics.classifier.forward import gradients_enabled
from lightning_gradmetrics.gradients.objectives import Loss, Objective
from lightning_gradmetrics.gradients.statistics import (
    GradientStatistics,
    Moment,
    accumulator,
    factor_moments,
    moments_for,
    result_dtype,
)

__all__ = [
    "Evidence",
    "Gradient",
    "HeadGradient",
    "Needs",
    "ParameterGradients",
    "Probe",
    "Target",
    "needs_of",
    "parameter_filter",
]

Target = str | Callable[[str], bool]
"""What a gradient is taken of: ``"head"`` (the head's weight), ``"all"`` (all parameters), a pattern such as
``"layer4.*"``, or a predicate on the parameter's name."""

Probe = Callable[[Any, Any], Tensor]
"""``(model, inputs) -> (N, ...)``: a computation of a score's own on the model, run with gradients enabled."""


def parameter_filter(target: Target) -> Callable[[str], bool] | None:
    """The predicate on parameter names that a target other than ``"head"`` stands for."""
    if callable(target):
        return target
    return None if target == "all" else lambda name: fnmatchcase(name, target)


class Gradient(Protocol):
    """Statistics of a gradient, each ``(N,)``."""

    @property
    def max(self) -> Tensor: ...  # noqa: D102
    @property
    def min(self) -> Tensor: ...  # noqa: D102
    @property
    def mean(self) -> Tensor: ...  # noqa: D102
    @property
    def std(self) -> Tensor: ...  # noqa: D102
    def norm(self, p: float = 2.0) -> Tensor: ...  # noqa: D102
    def statistic(self, name: str) -> Tensor: ...  # noqa: D102


class ParameterGradients(Gradient, Protocol):
    """Statistics of the gradients of several parameters, each ``(N, P)``."""

    @property
    def names(self) -> tuple[str, ...]: ...  # noqa: D102
    def by_layer(self) -> ParameterGradients: ...  # noqa: D102
    def merged(self) -> Gradient: ...  # noqa: D102


@dataclass(frozen=True)
class HeadGradient:
    """The gradient of the head's weight, ``g h^T``, by its factors: no backward pass and no gradient tensor.

    Args:
        output: The gradient of the logits ``g``, ``(N, C)``.
        features: The head's input ``h``, ``(N, D)``.
    """

    output: Tensor
    features: Tensor

    def moments(self, wanted: Iterable[Moment]) -> GradientStatistics:
        """The statistics that the wanted moments give."""
        count = torch.tensor(self.output.shape[1] * self.features.shape[1])
        return GradientStatistics(
            ("head",), count, factor_moments(self.output, self.features, wanted), result_dtype(self.output.dtype)
        )

    def statistic(self, name: str) -> Tensor:
        """A statistic by name, as in :meth:`GradientStatistics.statistic`."""
        return self.moments(moments_for([name])).statistic(name)

    def norm(self, p: float = 2.0) -> Tensor:
        """The p-norm, the product of the factors' p-norms."""
        return self.statistic(f"l{p:g}")

    max = property(lambda self: self.statistic("max"))
    min = property(lambda self: self.statistic("min"))
    mean = property(lambda self: self.statistic("mean"))
    std = property(lambda self: self.statistic("std"))


@dataclass(frozen=True)
class HeadColumn:
    """The gradient of the head's weight as that of a target with one parameter: statistics ``(N, 1)``.

    Args:
        head: The gradient.
    """

    head: HeadGradient
    names: tuple[str, ...] = ("head",)

    def statistic(self, name: str) -> Tensor:
        """A statistic by name."""
        return self.head.statistic(name)[:, None]

    def norm(self, p: float = 2.0) -> Tensor:
        """The p-norm."""
        return self.statistic(f"l{p:g}")

    def by_layer(self) -> HeadColumn:
        """It is one layer."""
        return self

    def merged(self) -> HeadGradient:
        """The head's gradient."""
        return self.head

    max = property(lambda self: self.statistic("max"))
    min = property(lambda self: self.statistic("min"))
    mean = property(lambda self: self.statistic("mean"))
    std = property(lambda self: self.statistic("std"))


def _exact(tensor: Tensor) -> Tensor:
    """The tensor in the precision of the accumulators: ``1 - p`` of a confident sample keeps its digits."""
    return tensor.detach().to(accumulator(tensor))


@dataclass
class Evidence:
    """What one batch offers to the scores. Asking for what is not there is an error that names it.

    Args:
        given_logits: ``(N, C)``.
        given_features: The head's input ``(N, D)``.
        given_labels: True labels ``(N,)``.
        given_outside: Which samples are out-of-distribution ``(N,)``, bool; known when a detector is fitted.
        gradients: Statistics of gradients by target and objective, per parameter.
        probes: Results of the scores' own computations.
        given_head: The head's weight ``(C, D)``, and its bias ``(C,)`` if it has one.
    """

    given_logits: Tensor
    given_features: Tensor | None = None
    given_labels: Tensor | None = None
    given_outside: Tensor | None = None
    gradients: dict[tuple[Target, Objective], GradientStatistics] = field(default_factory=dict)
    probes: dict[Probe, Tensor] = field(default_factory=dict)
    given_head: tuple[Tensor, Tensor | None] | None = None

    @property
    def logits(self) -> Tensor:
        """Logits ``(N, C)``, in float64 where the device has it."""
        return _exact(self.given_logits)

    @property
    def features(self) -> Tensor:
        """The head's input ``(N, D)``, in float64 where the device has it."""
        if self.given_features is None:
            raise ValueError("a score needs the head's input, which was not recorded")
        return _exact(self.given_features)

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        """The head's weight ``(C, D)`` and bias ``(C,)``, zero where it has none."""
        if self.given_head is None:
            raise ValueError("a score needs the head, which was not recorded")
        weight, bias = self.given_head
        return weight.detach(), weight.new_zeros(len(weight)) if bias is None else bias.detach()

    @property
    def labels(self) -> Tensor:
        """True labels ``(N,)``."""
        if self.given_labels is None:
            raise ValueError("a score needs true labels: pass targets=, or give batches (inputs, labels)")
        return self.given_labels

    @property
    def wrong(self) -> Tensor:
        """Which predictions are wrong ``(N,)``, bool."""
        return self.logits.argmax(1) != self.labels

    @property
    def outside(self) -> Tensor:
        """Which samples are out-of-distribution ``(N,)``, bool; known only when a score is fitted."""
        if self.given_outside is None:
            raise ValueError(
                "a score is fitted on in- and out-of-distribution samples: give both kinds of data, with roles"
            )
        return self.given_outside

    def gradient(self, objective: str | Loss | Objective, target: Target = "head", **arguments: Any) -> Gradient:
        """The gradient of an objective with respect to a target: statistics ``(N,)``."""
        objective = Objective.of(objective, **arguments)
        if target == "head":
            return self._head_gradient(objective)
        return self.gradients[target, objective].merged()

    def gradient_per_parameter(
        self, objective: str | Loss | Objective, target: Target = "all", **arguments: Any
    ) -> ParameterGradients:
        """The gradient of an objective with respect to each parameter of a target: statistics ``(N, P)``."""
        objective = Objective.of(objective, **arguments)
        if target == "head":
            return HeadColumn(self._head_gradient(objective))
        return self.gradients[target, objective]

    def rows(self, keep: Tensor) -> Evidence:
        """The evidence of the samples that ``keep`` ``(N,)``, bool, marks."""

        def take(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[keep]

        return Evidence(
            self.given_logits[keep],
            take(self.given_features),
            take(self.given_labels),
            take(self.given_outside),
            {key: value.rows(keep) for key, value in self.gradients.items()},
            {key: value[keep] for key, value in self.probes.items()},
            self.given_head,
        )

    def _head_gradient(self, objective: Objective) -> HeadGradient:
        with gradients_enabled():
            logits = self.logits.detach().clone().requires_grad_(True)
            losses = objective.loss(self.labels.clone() if objective.needs_targets else None)(logits)
            (output,) = torch.autograd.grad(losses.sum(), logits)
        return HeadGradient(output, self.features)

    def probe(self, function: Probe, shape: tuple[int, ...] = ()) -> Tensor:
        """The result ``(N, *shape)`` of a computation of the score's own on the model, ``function(model, inputs)``."""
        return self.probes[function]


@dataclass
class Needs:
    """What scores look at.

    Args:
        features: Whether the head's input.
        labels: Whether true labels.
        outside: Whether which samples are out-of-distribution.
        gradients: For each target, the objectives and the moments of their gradients.
        probes: Computations of the scores' own.
    """

    features: bool = False
    labels: bool = False
    outside: bool = False
    gradients: dict[Target, dict[Objective, set[Moment]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(set))
    )
    probes: list[Probe] = field(default_factory=list)

    @property
    def backward(self) -> bool:
        """Whether a backward pass through the network: a probe takes one, unless its ``backward`` is false."""
        return bool(self.gradients) or any(getattr(probe, "backward", True) for probe in self.probes)


class _RecordedGradient:
    """Stands in for a gradient in the dry run and notes the moments asked of it."""

    def __init__(self, moments: set[Moment], shape: tuple[int, ...]) -> None:
        self.moments, self.shape = moments, shape

    def statistic(self, name: str) -> Tensor:
        self.moments |= moments_for([name])
        return torch.ones(self.shape)

    def norm(self, p: float = 2.0) -> Tensor:
        return self.statistic(f"l{p:g}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"layer.{i}" for i in range(self.shape[1]))

    def by_layer(self) -> _RecordedGradient:
        return self

    def merged(self) -> _RecordedGradient:
        return _RecordedGradient(self.moments, self.shape[:1])

    max = property(lambda self: self.statistic("max"))
    min = property(lambda self: self.statistic("min"))
    mean = property(lambda self: self.statistic("mean"))
    std = property(lambda self: self.statistic("std"))


class _Recorder(Evidence):
    """Evidence of two made-up samples that notes what is looked at."""

    def __init__(self, needs: Needs, classes: int) -> None:
        logits, labels = torch.linspace(-1, 1, 2 * classes).view(2, classes), torch.zeros(2, dtype=torch.long)
        super().__init__(logits, torch.ones(2, 3), labels, torch.tensor([False, True]))
        self.needs = needs

    @property
    def features(self) -> Tensor:
        self.needs.features = True
        return super().features

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        classes = self.given_logits.shape[1]
        return torch.ones(classes, self.features.shape[1]), torch.zeros(classes)

    @property
    def labels(self) -> Tensor:
        self.needs.labels = True
        return super().labels

    @property
    def outside(self) -> Tensor:
        self.needs.outside = True
        return super().outside

    def gradient(self, objective: str | Loss | Objective, target: Target = "head", **arguments: Any) -> Gradient:
        objective = Objective.of(objective, **arguments)
        if target == "head":
            return super().gradient(objective, target)
        return self._recorded(objective, target, (2,))

    def gradient_per_parameter(
        self, objective: str | Loss | Objective, target: Target = "all", **arguments: Any
    ) -> ParameterGradients:
        objective = Objective.of(objective, **arguments)
        if target == "head":
            return super().gradient_per_parameter(objective, target)
        return self._recorded(objective, target, (2, 4))

    def _recorded(self, objective: Objective, target: Target, shape: tuple[int, ...]) -> _RecordedGradient:
        self.needs.labels |= objective.needs_targets
        return _RecordedGradient(self.needs.gradients[target][objective], shape)

    def probe(self, function: Probe, shape: tuple[int, ...] = ()) -> Tensor:
        if function not in self.needs.probes:
            self.needs.probes.append(function)
        return torch.ones(2, *shape)


def needs_of(scores: Iterable[Callable[[Evidence], Tensor]], classes: int = 3) -> Needs:
    """What the scores look at, found by a dry run of each on two made-up samples with ``classes`` classes.

    A score declares nothing: what it asks of the evidence is what it needs. A fitted score's dry run is its ``look``,
    which needs no state.

    Example:
        >>> from lightning_gradmetrics.scores import make
        >>> needs_of([make("gradnorm"), make("entropy")]).features
        True
    """
    needs = Needs()
    for score in scores:
        getattr(score, "look", score)(_Recorder(needs, classes))
    return needs
