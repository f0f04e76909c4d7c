"""A LightningModule around a classification network, and loading of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_gradmetrics.classifier.batches import split_batch
from lightning_gradmetrics.classifier.forward import call

__all__ = ["Classifier", "load_weights"]


class Classifier(LightningModule):
    """A classifier: cross-entropy in training, logits in prediction.

    Args:
        network: Returns logits ``(N, C)`` for inputs ``(N, ...)``, which may be keyword arguments.
        learning_rate: The learning rate of Adam.
    """

    def __init__(self, network: nn.Module, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.network = network
        self.learning_rate = learning_rate

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the output of the network: the logits ``(N, C)``, or an output that contains them."""
        return self.network(*inputs, **named)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy."""
        inputs, labels = batch
        return nn.functional.cross_entropy(self(inputs), labels)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Compute the logits, which callbacks score."""
        call(self, split_batch(batch)[0])

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return the output of the network for the inputs of a batch."""
        return call(self, split_batch(batch)[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam with the learning rate."""
        return torch.optim.Adam(self.parameters(), self.learning_rate)


def load_weights(network: nn.Module, checkpoint: str | Path) -> None:
    """Load a state dict, possibly inside ``{"state_dict": ...}``; prefixes such as ``module.`` or ``model.`` are removed.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a state dict, or its keys do not fit the network.
    """
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint {str(checkpoint)!r}: give the path of a state dict saved with torch.save"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    wanted = set(network.state_dict())
    for prefix in ("", "module.", "model.", "network.", "net."):
        taken = {key.removeprefix(prefix): value for key, value in state.items()}
        if set(taken) == wanted:
            network.load_state_dict(taken)
            return
    missing, extra = sorted(wanted - set(state)), sorted(set(state) - wanted)
    raise ValueError(
        f"the checkpoint {str(checkpoint)!r} does not fit {type(network).__name__}: it lacks {len(missing)} "
        f"keys such as {missing[:3]} and has {len(extra)} unknown ones such as {extra[:3]}; choose the model it was saved from"
    )
