"""One observed batch: everything that scores are computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import Inputs
from lightning_gradmetrics.classifier.head import Head
from lightning_gradmetrics.classifier.sample_axis import SampleAxis
from lightning_gradmetrics.gradients.head_features import HeadFeatures
from lightning_gradmetrics.scoring.evidence import Probe

__all__ = ["ObservedBatch", "ScoredTokens"]


@dataclass(frozen=True)
class ScoredTokens:
    """The scored tokens of a batch of texts, one sequence after the other.

    Args:
        ids: The token ids ``(M,)``.
        positions: The position of each token in its text ``(M,)``; the logits one position earlier predict it.
        lengths: The number of scored tokens of each sequence ``(N,)``, possibly 0.
        context: The token ids that the model received ``(N, T)``; negative at padding.
        of_texts: The scores of whole texts ``(N,)`` by name.
    """

    ids: Tensor
    positions: Tensor
    lengths: Tensor
    context: Tensor
    of_texts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ObservedBatch:
    """One batch, as the model received it.

    Args:
        inputs: The arguments of the model's call, copied before it ran; ``None`` if they are unknown.
        logits: A copy of the logits of the call: ``(N, C)``, or ``(N, C, *P)`` with one prediction per position.
        features: A copy of the head's input ``(N, D)``, or of its inputs at the positions; ``None`` if no score needs
            it.
        head: The head; ``None`` if no score needs it.
        labels: True labels ``(N,)``, or ``(N, *P)``, or ``None``.
        ood: Which samples are out-of-distribution ``(N,)``, bool, or ``None`` if unknown.
        dataset: The name of the dataset, for messages.
        called: The module that was called with the inputs; ``None`` for the model itself.
        one_logit: Whether the logits are ``(0, z)`` of a model with one logit z.
        slope: The derivative of the logits with respect to the head's output: a number, or ``(N, C, *P)``.
        observed: The results of the probes that were evaluated during this forward pass.
        sample_axis: What the user states about the arguments in ``inputs``: 0 if they have samples, ``None`` if all samples
            share them.
        tokens: The scored tokens of a batch of texts, whose logits and features are rows ``(M, V)`` and ``(M, D)``, one
            per token; otherwise ``None``.
    """

    inputs: Inputs | None
    logits: Tensor
    features: Tensor | HeadFeatures | None = None
    head: Head | None = None
    labels: Tensor | None = None
    ood: Tensor | None = None
    dataset: str | None = None
    called: nn.Module | None = None
    one_logit: bool = False
    slope: Tensor | float = 1.0
    observed: Mapping[Probe, Tensor] = field(default_factory=dict)
    sample_axis: SampleAxis = 0
    tokens: ScoredTokens | None = None

    @property
    def size(self) -> int:
        """The number of samples ``N``: the rows of the logits, or the texts of a batch of tokens."""
        return len(self.logits) if self.tokens is None else len(self.tokens.lengths)
