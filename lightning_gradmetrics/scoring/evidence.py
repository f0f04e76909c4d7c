"""Evidence: everything that a score may read about one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NoReturn, Protocol

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
    "MissingEvidenceError",
    "ParameterGradients",
    "Probe",
    "Target",
    "parameter_filter",
]

Target = str | Callable[[str], bool]
"""The parameters of a gradient: ``"head"`` (the head's weight), ``"all"`` (all parameters), a pattern such as
``"layer4.*"``, or a predicate on the parameter's name."""

Probe = Callable[[Any, Any], Tensor]
"""``(model, inputs) -> (N, ...)``: a score's own computation on the model, run with gradients enabled."""


def parameter_filter(target: Target) -> Callable[[str], bool] | None:
    """Return the predicate on parameter names for a target other than ``"head"``; ``None`` accepts all."""
    if callable(target):
        return target
    if target == "all":
        return None
    return lambda name: fnmatchcase(name, target)


class MissingEvidenceError(ValueError):
    """A score asked for evidence that was not gathered for this batch."""


class Gradient(Protocol):
    """Statistics of a gradient's entries: ``(N,)``, or ``(N, P)`` for each of P parameters."""

    def statistic(self, name: str) -> Tensor:
        """Return a statistic by name: ``max``, ``min``, ``mean``, ``std``, ``l1``, ``l2``, ``linf`` or any ``l<p>``."""
        ...

    def norm(self, p: float = 2.0) -> Tensor:
        """Return the p-norm."""
        return self.statistic(f"l{p:g}")

    @property
    def max(self) -> Tensor:
        """The largest entry."""
        return self.statistic("max")

    @property
    def min(self) -> Tensor:
        """The smallest entry."""
        return self.statistic("min")

    @property
    def mean(self) -> Tensor:
        """The mean entry."""
        return self.statistic("mean")

    @property
    def std(self) -> Tensor:
        """The unbiased standard deviation of the entries."""
        return self.statistic("std")


class ParameterGradients(Gradient, Protocol):
    """Statistics of the gradients of P parameters, ``(N, P)`` each."""

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names."""
        ...

    def by_layer(self) -> ParameterGradients:
        """Merge the parameters of each layer."""
        ...

    def merged(self) -> Gradient:
        """Merge all parameters."""
        ...


@dataclass(frozen=True)
class HeadGradient(Gradient):
    """The gradient of the head's weight, ``g h^T``, by its factors: no backward pass and no gradient tensor.

    Args:
        output: The gradient of the logits ``g``, ``(N, C)``.
        features: The head's input ``h``, ``(N, D)``.
    """

    output: Tensor
    features: Tensor

    def moments(self, wanted: Iterable[Moment]) -> GradientStatistics:
        """Return the statistics that can be computed from the wanted moments."""
        count = torch.tensor(self.output.shape[1] * self.features.shape[1])
        moments = factor_moments(self.output, self.features, wanted)
        return GradientStatistics(("head",), count, moments, result_dtype(self.output.dtype))

    def statistic(self, name: str) -> Tensor:
        """Return a statistic by name, ``(N,)``."""
        return self.moments(moments_for([name])).statistic(name)


@dataclass(frozen=True)
class HeadColumn(ParameterGradients):
    """The gradient of the head's weight as a target with one parameter: statistics ``(N, 1)``.

    Args:
        head: The gradient.
    """

    head: HeadGradient

    @property
    def names(self) -> tuple[str, ...]:
        """The name of the only parameter."""
        return ("head",)

    def statistic(self, name: str) -> Tensor:
        """Return a statistic by name, ``(N, 1)``."""
        return self.head.statistic(name)[:, None]

    def by_layer(self) -> HeadColumn:
        """Return itself: one parameter is one layer."""
        return self

    def merged(self) -> HeadGradient:
        """Return the head's gradient."""
        return self.head


def _exact(tensor: Tensor) -> Tensor:
    """Convert to the accumulators' precision, so that ``1 - p`` of a confident sample keeps its digits."""
    return tensor.detach().to(accumulator(tensor))


@dataclass
class Evidence:
    """What one batch offers to the scores.

    Args:
        given_logits: ``(N, C)``.
        given_features: The head's input ``(N, D)``.
        given_labels: True labels ``(N,)``.
        given_ood: Which samples are out-of-distribution ``(N,)``, bool; known when a detector is fitted.
        gradients: Statistics of gradients by target and objective, per parameter.
        probes: Results of the scores' own computations.
        given_head: The head's weight ``(C, D)``, and its bias ``(C,)`` if it has one.

    Raises:
        MissingEvidenceError: From every property and method, if the batch lacks what is asked for.

    Example:
        >>> evidence = Evidence(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.ones(2, 3))
        >>> evidence.gradient("uniform").norm(1)
        tensor([2.2848, 0.0000], dtype=torch.float64)
    """

    given_logits: Tensor
    given_features: Tensor | None = None
    given_labels: Tensor | None = None
    given_ood: Tensor | None = None
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
            _missing("the head's input")
        return _exact(self.given_features)

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        """The head's weight ``(C, D)`` and bias ``(C,)``, zero where it has none."""
        if self.given_head is None:
            _missing("the head's weight")
        weight, bias = self.given_head
        return weight.detach(), weight.new_zeros(len(weight)) if bias is None else bias.detach()

    @property
    def labels(self) -> Tensor:
        """True labels ``(N,)``."""
        if self.given_labels is None:
            raise MissingEvidenceError("needs true labels: pass targets=, or give batches (inputs, labels)")
        return self.given_labels

    @property
    def incorrect(self) -> Tensor:
        """Which predictions are incorrect ``(N,)``, bool."""
        return self.logits.argmax(1) != self.labels

    @property
    def ood(self) -> Tensor:
        """Which samples are out-of-distribution ``(N,)``, bool; known only when a score is fitted."""
        if self.given_ood is None:
            raise MissingEvidenceError(
                "is fitted on in- and out-of-distribution samples: give both kinds of data, with roles"
            )
        return self.given_ood

    def gradient(self, objective: str | Loss | Objective, target: Target = "head", **arguments: Any) -> Gradient:
        """Return the gradient of an objective with respect to a target: statistics ``(N,)``.

        Args:
            objective: A name, as ``"pseudo_label"``, or a loss from logits ``(N, C)`` to ``(N,)``.
            target: The parameters.
            **arguments: Of the objective, as ``temperature``.
        """
        objective = Objective.of(objective, **arguments)
        if target == "head":
            return self._head_gradient(objective)
        return self._recorded(target, objective).merged()

    def gradient_per_parameter(
        self, objective: str | Loss | Objective, target: Target = "all", **arguments: Any
    ) -> ParameterGradients:
        """Return the gradient of an objective with respect to each parameter of a target: statistics ``(N, P)``.

        Args:
            objective: A name, as ``"pseudo_label"``, or a loss from logits ``(N, C)`` to ``(N,)``.
            target: The parameters.
            **arguments: Of the objective, as ``temperature``.
        """
        objective = Objective.of(objective, **arguments)
        if target == "head":
            return HeadColumn(self._head_gradient(objective))
        return self._recorded(target, objective)

    def probe(self, function: Probe, shape: tuple[int, ...] = ()) -> Tensor:
        """Return the result ``(N, *shape)`` of a score's own computation on the model, ``function(model, inputs)``."""
        if function not in self.probes:
            _missing(f"the computation {function!r} on the model")
        return self.probes[function]

    def rows(self, keep: Tensor) -> Evidence:
        """Return the evidence of the samples where ``keep`` ``(N,)`` is true."""

        def take(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[keep]

        return Evidence(
            self.given_logits[keep],
            take(self.given_features),
            take(self.given_labels),
            take(self.given_ood),
            {key: value.rows(keep) for key, value in self.gradients.items()},
            {key: value[keep] for key, value in self.probes.items()},
            self.given_head,
        )

    def _recorded(self, target: Target, objective: Objective) -> GradientStatistics:
        if (target, objective) not in self.gradients:
            _missing(f"the gradient of the objective {objective.name!r} with respect to {target!r}")
        return self.gradients[target, objective]

    def _head_gradient(self, objective: Objective) -> HeadGradient:
        with gradients_enabled():
            logits = self.logits.detach().clone().requires_grad_(True)
            losses = objective.loss(self.labels.clone() if objective.needs_targets else None)(logits)
            (output,) = torch.autograd.grad(losses.sum(), logits)
        return HeadGradient(output, self.features)


def _missing(what: str) -> NoReturn:
    raise MissingEvidenceError(
        f"requested {what}, which it did not request in its dry run on synthetic samples: a score must request the same "
        "evidence for any data. Compute all cases and choose between them with torch.where"
    )
