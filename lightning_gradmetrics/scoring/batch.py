"""One observed batch: everything that scores are computed from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import Inputs
from lightning_gradmetrics.classifier.head import Head

__all__ = ["ObservedBatch"]


@dataclass(frozen=True)
class ObservedBatch:
    """One batch, as the model received it.

    Args:
        inputs: The arguments of the model's call, copied before it ran; ``None`` if they are unknown.
        logits: A copy of the logits that the call returned ``(N, C)``.
        features: The head's input ``(N, D)``, copied; ``None`` if no score needs it.
        head: The head; ``None`` if no score needs it.
        labels: True labels ``(N,)``, or ``None``.
        ood: Which samples are out-of-distribution ``(N,)``, bool, or ``None`` if unknown.
        dataset: The name of the data set, for messages.
        called: The module that was called with the inputs; ``None`` for the model itself.
    """

    inputs: Inputs | None
    logits: Tensor
    features: Tensor | None = None
    head: Head | None = None
    labels: Tensor | None = None
    ood: Tensor | None = None
    dataset: str | None = None
    called: nn.Module | None = None

    @property
    def size(self) -> int:
        """The number of samples ``N``: the rows of the logits."""
        return len(self.logits)
