"""One observed batch: everything that scores are computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import Inputs
from lightning_gradmetrics.classifier.head import Head
from lightning_gradmetrics.gradients.head_features import HeadFeatures
from lightning_gradmetrics.scoring.evidence import Probe

__all__ = ["ObservedBatch", "ScoredTokens"]


@dataclass(frozen=True)
class ScoredTokens:
    """The tokens of a batch of texts that are scored, one sequence after the other.

    Args:
        ids: The tokens that came ``(M,)``.
        positions: The position of each token in its text ``(M,)``; the logits one position earlier predict it.
        lengths: The number of scored tokens of each sequence ``(N,)``; 0 where a text has none.
    """

    ids: Tensor
    positions: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class ObservedBatch:
    """One batch, as the model received it.

    Args:
        inputs: The arguments of the model's call, copied before it ran; ``None`` if they are not known.
        logits: What the call returned, copied: ``(N, C)``, or ``(N, C, *P)`` with one prediction per position.
        features: The head's input ``(N, D)``, or at positions, copied; ``None`` where nobody needs it.
        head: The head; ``None`` where nobody needs it.
        labels: True labels ``(N,)``, or ``(N, *P)``, or ``None``.
        ood: Which samples are out-of-distribution ``(N,)``, bool, or ``None`` if that is not known.
        dataset: The name of the dataset, for messages.
        order: The number in the dataloader's batch of each sample ``(N,)``, or ``None`` if the order is the same.
        called: The module that was called with the inputs; ``None`` for the model itself.
        one_logit: Whether the logits are ``(0, z)`` of a model with one logit z.
        observed: The results of the probes that were read in this forward pass.
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
    order: Tensor | None = None
    called: nn.Module | None = None
    one_logit: bool = False
    observed: Mapping[Probe, Tensor] = field(default_factory=dict)
    tokens: ScoredTokens | None = None

    @property
    def size(self) -> int:
        """The number of samples ``N``: the rows of the logits, or the texts of a batch of tokens."""
        return len(self.logits) if self.tokens is None else len(self.tokens.lengths)
