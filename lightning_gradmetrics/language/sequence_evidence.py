"""Evidence of whole sequences: the gradient of the answer's mean loss, one per sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_gradmetrics.classifier.forward import gradients_enabled
from lightning_gradmetrics.gradients.objectives import Loss, Objective
from lightning_gradmetrics.gradients.statistics import GradientStatistics
from lightning_gradmetrics.language.embedding_gradients import embedding_uses, row_losses
from lightning_gradmetrics.language.model import LanguageModel
from lightning_gradmetrics.language.sequence_gradients import SequenceFactors, SequenceGradient
from lightning_gradmetrics.language.sequences import Padded
from lightning_gradmetrics.language.token_rows import TokenRows
from lightning_gradmetrics.language.whole_network import network_statistics, token_objective
from lightning_gradmetrics.scoring.dry_run import Needs
from lightning_gradmetrics.scoring.evidence import (
    Evidence,
    Gradient,
    MissingEvidenceError,
    Probe,
    Target,
    TextProbe,
    parameter_filter,
)

__all__ = ["TIED", "SequenceEvidence", "output_gradients", "sequence_evidence"]

TIED = "tied"
"""The target of a tied weight: its use as the head and its use as the input embedding."""


def output_gradients(objective: Objective, rows: TokenRows) -> Tensor:
    """Return the gradient of one sequence's mean loss with respect to the head's outputs, ``(T, V)``.

    Args:
        objective: The loss of a token.
        rows: The sequence.
    """
    with gradients_enabled():
        leaf = TokenRows(
            rows.logits.detach().clone().requires_grad_(True), rows.features, rows.output, rows.labels, rows.lengths
        )
        losses = row_losses(objective, leaf)
        (gradient,) = torch.autograd.grad(losses.mean(), leaf.logits)
    return gradient * rows.slope


@dataclass
class SequenceEvidence(Evidence):
    """Evidence of N sequences as samples, with the gradients of their mean losses.

    Args:
        rows: The tokens of the sequences.
        uses: For each objective, the uses of a tied weight as the embedding.
    """

    rows_of_tokens: TokenRows | None = None
    uses: Mapping[Objective, Any] = field(default_factory=dict)

    def gradient(self, objective: str | Loss | Objective, target: Target = "head", **arguments: Any) -> Gradient:
        """Return the gradient of the mean of a token's objective: statistics ``(N,)``."""
        objective = token_objective(Objective.of(objective, **arguments))
        if target == "head":
            return self._factors(objective, None)  # type: ignore[return-value]
        if target == TIED:
            return self._factors(objective, self.uses[objective])  # type: ignore[return-value]
        return self._recorded(target, objective).merged()

    def _factors(self, objective: Objective, uses: Any) -> SequenceGradient:
        assert self.rows_of_tokens is not None
        sequences = []
        for number, rows in enumerate(self.rows_of_tokens.sequences()):
            output = output_gradients(objective, rows)
            sequences.append(SequenceFactors(output, rows.features, None if uses is None else uses[number]))
        return SequenceGradient(sequences, self.rows_of_tokens.logits.dtype)

    @property
    def logits(self) -> Tensor:
        """Raise an error, because a sequence has no logits."""
        _undefined("the logits")

    @property
    def features(self) -> Tensor:
        """Raise an error, because a sequence has no head input."""
        _undefined("the head's input")


def _undefined(what: str) -> NoReturn:
    raise MissingEvidenceError(
        f"reads {what}, which a sequence does not have: it is a score of tokens, or needs target='head'"
    )


def sequence_evidence(
    model: LanguageModel, batch: Padded, rows: TokenRows | None, needs: Needs, engine: str = "auto"
) -> SequenceEvidence:
    """Return the evidence of the sequences of a batch.

    Args:
        model: The model.
        batch: The batch.
        rows: The tokens of its answers; ``None`` if no score needs a gradient of the head.
        needs: The evidence that the scores need.
        engine: The engine.
    """
    gradients: dict[tuple[Target, Objective], GradientStatistics] = {}
    uses: dict[Objective, Any] = {}
    for target, wanted in needs.gradients.items():
        if target == TIED:
            objectives = [token_objective(objective) for objective in wanted]
            uses.update(zip(objectives, embedding_uses(model, batch, objectives), strict=True))
            continue
        accepts = _checked_filter(model, target)
        for objective, statistics in network_statistics(model, batch, wanted, accepts, engine).items():
            gradients[target, objective] = statistics
    probes: dict[Probe, Tensor] = {}
    for probe in needs.probes:
        assert isinstance(probe, TextProbe)
        probes[probe] = probe.of_texts(model, batch)
    size = len(batch.sequences)
    return SequenceEvidence(torch.empty(size, 0), gradients=gradients, probes=probes, rows_of_tokens=rows, uses=uses)


def _checked_filter(model: LanguageModel, target: Target) -> Callable[[str], bool] | None:
    accepts = parameter_filter(target)
    names = [name for name, _ in model.module.named_parameters(model.prefix.removesuffix("."))]
    if accepts is not None and not any(map(accepts, names)):
        raise ValueError(
            f"the target {target!r} of a score chooses no parameter; the parameters are: {', '.join(names[:12])}"
        )
    return accepts
