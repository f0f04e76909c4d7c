"""Evidence: everything that a score may read about one batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_gradmetrics.engine.kernels.softmax import softmax_of
from lightning_gradmetrics.gradients.head_features import HeadFeatures
from lightning_gradmetrics.gradients.objectives import Loss, Objective
from lightning_gradmetrics.gradients.output_gradients import lazy_output_gradient
from lightning_gradmetrics.gradients.precision import at_least_float32, wide_dtype
from lightning_gradmetrics.gradients.softmax import Softmax
from lightning_gradmetrics.gradients.statistics import GradientStatistics, accumulator
from lightning_gradmetrics.scoring.gradient import Gradient, HeadColumn, HeadGradient, ParameterGradients

__all__ = [
    "Evidence",
    "Gradient",
    "HeadGradient",
    "MissingEvidenceError",
    "ObservableProbe",
    "ParameterGradients",
    "Probe",
    "SharedProbe",
    "Target",
    "TextProbe",
    "by_passes",
    "parameter_filter",
]

Target = str | Callable[[str], bool]
"""The parameters of a gradient: ``"head"`` (the head's weight), ``"all"`` (all parameters), a pattern such as
``"layer4.*"``, or a predicate on the parameter's name."""

Probe = Callable[[Any, Any], Tensor]
"""``(model, inputs) -> (N, ...)``: a score's own computation on the model, run with gradients enabled."""


@runtime_checkable
class ObservableProbe(Protocol):
    """A probe that hooks can evaluate during the forward pass of the prediction, without another pass.

    Calling it is the fallback for a compiled model, and for a step that does not call the model exactly once.
    """

    def observing(self, model: nn.Module) -> AbstractContextManager[Callable[[int], Tensor | None]]:
        """Return a context that observes the model, and yields a function from N to the result ``(N, ...)`` or ``None``."""

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return the result by a forward pass."""


@runtime_checkable
class SharedProbe(Protocol):
    """A probe that runs the same forward passes as others: those with equal ``passes`` are computed together."""

    @property
    def passes(self) -> Hashable:
        """The key that probes have in common if they are computed together."""

    @staticmethod
    def together(probes: Sequence[Any], model: nn.Module, inputs: Any) -> dict[Any, Tensor]:
        """Return the results of probes with equal passes."""


@runtime_checkable
class TextProbe(Protocol):
    """A probe with one value per text of a language model; it is not defined for other samples."""

    def of_texts(self, model: Any, batch: Any) -> Tensor:
        """Return the result of each text ``(N,)``, from the model and a batch of the room ``language``."""


def by_passes(probes: Sequence[Any]) -> list[tuple[Any, list[Any]]]:
    """Return each group of probes that are computed together, with its first probe."""
    groups: dict[Any, list[Any]] = {}
    for probe in probes:
        key = (type(probe).together, probe.passes) if isinstance(probe, SharedProbe) else probe
        groups.setdefault(key, []).append(probe)
    return [(members[0], members) for members in groups.values()]


def parameter_filter(target: Target) -> Callable[[str], bool] | None:
    """Return the predicate on parameter names for a target other than ``"head"``; ``None`` accepts all."""
    if callable(target):
        return target
    if target == "all":
        return None
    return lambda name: fnmatchcase(name, target)


class MissingEvidenceError(ValueError):
    """A score requested evidence that was not collected for this batch."""


@dataclass
class Evidence:
    """Everything that scores can read about one batch: the interface between observing a model and scoring it.

    **Units.** A batch holds N samples. Every sample has one score, or one score per position: per pixel of a
    segmentation model, per token of a language model. Below, ``*P`` is the shape of the positions: ``()`` for samples,
    ``(H, W)`` for pixels, ``(T,)`` for tokens. The class axis of the logits is always axis 1 and positions follow it:
    ``(N, C)``, ``(N, C, H, W)``, ``(N, V, T)``. A score returns ``(N, *P)``.

    **Writing a score.** Reduce over axis 1, as in ``evidence.logits.amax(1)``, and never over the last axis: the same
    function then scores samples, pixels and tokens. A score that reads ``evidence.logits``, ``evidence.softmax()``,
    ``evidence.head_input`` or a head's ``evidence.gradient(...)`` works at every position. Before the first batch with
    positions, the score is tested on synthetic maps: if its values differ from those for the same positions as rows
    ``(M, C)``, it always receives rows. Such a score is still correct, but slower for maps.

    **Not available per position.** Gradients of parameters before the head, and computations on the model (``probe``),
    mix all positions of a sample and would take one backward pass per position. They are refused.

    **Precision.** Samples are in float64 where the device has it; positions in the logits' type, at least float32.

    **One logit.** For a binary model with one logit z, the evidence has the logits ``(0, z)``; the gradient of its head
    has one row, that of z.

    Args:
        given_logits: ``(N, C, *P)``.
        given_features: The head's input: ``(N, D, *P)``, or patches of it that are mapped to the positions.
        given_labels: True labels ``(N, *P)``; at positions, -100 means unknown.
        given_ood: Which samples are out-of-distribution ``(N,)``, bool; known when a detector is fitted.
        gradients: Statistics of gradients by target and objective, per parameter; for samples only.
        probes: Results of the scores' own computations; for samples only.
        given_head: The head's weight ``(C, D)``, and its bias ``(C,)`` if it has one.
        one_logit: Whether the logits are ``(0, z)`` of a head with one row.
        given_slope: The derivative of the logits with respect to the head's output: a number where the model scales them,
            ``(N, C, *P)`` where it caps them.

    Raises:
        MissingEvidenceError: From every property and method, if the batch does not have the requested evidence.

    Example:
        >>> import torch
        >>> evidence = Evidence(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.ones(2, 3))
        >>> evidence.gradient("uniform").norm(1)
        tensor([2.2848, 0.0000], dtype=torch.float64)
        >>> pixels = Evidence(torch.zeros(2, 5, 4, 4), torch.ones(2, 3, 4, 4))
        >>> pixels.gradient("uniform").norm(1).shape
        torch.Size([2, 4, 4])
    """

    given_logits: Tensor
    given_features: Tensor | HeadFeatures | None = None
    given_labels: Tensor | None = None
    given_ood: Tensor | None = None
    gradients: dict[tuple[Target, Objective], GradientStatistics] = field(default_factory=dict)
    probes: dict[Probe, Tensor] = field(default_factory=dict)
    given_head: tuple[Tensor, Tensor | None] | None = None
    one_logit: bool = False
    given_slope: Tensor | float = 1.0
    _softmax: dict[float, Softmax] = field(default_factory=dict, repr=False)

    @property
    def has_positions(self) -> bool:
        """Whether the scores are per position and not per sample."""
        return self.given_logits.ndim > 2

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a score, ``(N, *P)``."""
        return (len(self.given_logits), *self.given_logits.shape[2:])

    @cached_property
    def given_prediction(self) -> Tensor:
        """The class with the largest logit ``(N, *P)``; for maps on a CPU, an argmax over axis 1 takes 4 to 15 times as long."""
        return self.given_logits.detach().max(1).indices

    @cached_property
    def logits(self) -> Tensor:
        """Logits ``(N, C, *P)``, in float64 for samples where the device has it, and in at least float32 for positions."""
        return self.given_logits.detach().to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The type of :attr:`logits`."""
        given = self.given_logits
        return wide_dtype(given.dtype) if self.has_positions else accumulator(given)

    @property
    def logits_like(self) -> Tensor:
        """A tensor with the shape, the type and the device of :attr:`logits`, without their memory; its values are arbitrary."""
        return self.given_logits.new_empty((), dtype=self.dtype).expand(self.given_logits.shape)

    def softmax(self, temperature: float = 1.0, *, roots: bool = False) -> Softmax:
        """Return the softmax of the logits divided by a temperature, computed once for all scores.

        Args:
            temperature: The temperature.
            roots: Whether the score reads ``powers_of_others(0.5)``, which is then computed in the same pass.
        """
        if temperature not in self._softmax:
            self._softmax[temperature] = softmax_of(self.given_logits, temperature, self.dtype, roots)
        return self._softmax[temperature]

    @property
    def features(self) -> Tensor:
        """The head's input as vectors ``(N, D, *P)``. Norms of it come from :attr:`head_input`, which stores no vectors."""
        if isinstance(self.given_features, Tensor):
            features = self.given_features.detach()
            wide = at_least_float32(features) if features.ndim > 2 else features.to(accumulator(features))
            return wide if self._scale == 1 else self._scale * wide
        return self.head_input.dense()

    @property
    def head_input(self) -> HeadFeatures:
        """The head's input with its moments and norms over axis 1, ``(N, *P)`` each.

        Where the model scales the head's output, the factor is part of the features: ``c (W h + b) = W (c h) + c b``.
        """
        return self.layer_input if self._scale == 1 else self.layer_input.scaled(self._scale)

    @property
    def layer_input(self) -> HeadFeatures:
        """The input of the head's layer, without the factor of a model that scales its logits."""
        return self._layer_input

    @property
    def _scale(self) -> float:
        """The factor from the head's output to the logits."""
        if isinstance(self.given_slope, Tensor):
            raise MissingEvidenceError(
                "uses a closed form for heads whose output is the logits; this model caps its logits, so it would not be exact. "
                "Use gradnorm, uniform, pseudo_label, grand, feature_norm or scores of the logits"
            )
        return self.given_slope

    @cached_property
    def _layer_input(self) -> HeadFeatures:
        if self.given_features is None:
            _missing("the head's input")
        features = self.given_features
        return HeadFeatures.of(features, is_precise=True) if isinstance(features, Tensor) else features.precise()

    @property
    def has_product_gradient(self) -> bool:
        """Whether the head's gradient is one outer product with all logits; false for grouped channels and a single logit."""
        return self.head_input.is_product and not self.one_logit

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        """The head's weight ``(C, D)`` and bias ``(C,)``, zero if it has none."""
        if self.given_head is None:
            _missing("the head's weight")
        weight, bias = self.given_head
        return weight.detach(), weight.new_zeros(len(weight)) if bias is None else self._scale * bias.detach()

    @property
    def labels(self) -> Tensor:
        """True labels ``(N, *P)``; -100 where the label of a position is unknown."""
        if self.given_labels is None:
            raise MissingEvidenceError("needs true labels: pass targets=, or give batches (inputs, labels)")
        return self.given_labels

    @property
    def incorrect(self) -> Tensor:
        """Which predictions are incorrect ``(N, *P)``, bool."""
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
        """Return the gradient of an objective with respect to a target: statistics ``(N, *P)``.

        Args:
            objective: A name such as ``"pseudo_label"``, or a loss from logits ``(N, C)`` to ``(N,)``.
            target: The parameters.
            **arguments: Arguments of the objective, such as ``temperature``.
        """
        objective = Objective.of(objective, **arguments)
        if target == "head":
            return self._head_gradient(objective)
        return self._recorded(target, objective).merged()

    def gradient_per_parameter(
        self, objective: str | Loss | Objective, target: Target = "all", **arguments: Any
    ) -> ParameterGradients:
        """Return the gradient of an objective with respect to each parameter of a target: statistics ``(N, K, *P)``.

        Args:
            objective: A name such as ``"pseudo_label"``, or a loss from logits ``(N, C)`` to ``(N,)``.
            target: The parameters.
            **arguments: Arguments of the objective, such as ``temperature``.
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

        original = self.given_features
        features = original.rows(keep) if isinstance(original, HeadFeatures) else take(original)
        gradients = {}
        for key, statistics in self.gradients.items():
            gradients[key] = statistics.rows(keep)
        probes = {}
        for function, value in self.probes.items():
            probes[function] = value[keep]
        labels, ood = take(self.given_labels), take(self.given_ood)
        slope = self.given_slope[keep] if isinstance(self.given_slope, Tensor) else self.given_slope
        return Evidence(
            self.given_logits[keep], features, labels, ood, gradients, probes, self.given_head, self.one_logit, slope
        )

    def _recorded(self, target: Target, objective: Objective) -> GradientStatistics:
        if (target, objective) not in self.gradients:
            _missing(f"the gradient of the objective {objective.name!r} with respect to {target!r}")
        return self.gradients[target, objective]

    def _head_gradient(self, objective: Objective) -> HeadGradient:
        targets = self.labels if objective.needs_targets else None
        known = lazy_output_gradient(objective, self.logits_like, lambda: self.logits, self.softmax, targets)
        output = known.tensor[:, 1:] if self.one_logit else known
        if isinstance(self.given_slope, Tensor):
            whole = output if isinstance(output, Tensor) else known.tensor
            return HeadGradient(whole * self.given_slope, self.layer_input)
        return HeadGradient(output, self.head_input)


def _missing(what: str) -> NoReturn:
    raise MissingEvidenceError(
        f"requests {what}, but did not in its dry run on synthetic samples: a score must request the same "
        "evidence for any data. Compute all cases and choose between them with torch.where"
    )
