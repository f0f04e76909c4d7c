"""A small detector trained on feature vectors: two fully connected layers, trained with Lightning."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["Detector", "cross_validated_auroc", "train_detector"]

STEPS = 20
"""Steps an epoch, at most for small data: the batch grows with the data."""


class Detector(LightningModule):
    """Two fully connected layers with a ReLU between them, and one logit.

    Args:
        inputs: Number of features.
        hidden: Width of the hidden layer.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 1)).double()

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(N,)`` of features ``(N, F)``."""
        return self.network(features)[:, 0]  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The binary cross-entropy."""
        features, labels = batch
        return nn.functional.binary_cross_entropy_with_logits(self(features), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam with weight decay."""
        return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=1e-2)


def train_detector(features: Tensor, labels: Tensor, hidden: int = 32, epochs: int = 30, seed: int = 0) -> Detector:
    """A detector trained on standardised features.

    Args:
        features: ``(N, F)``, float64.
        labels: ``(N,)``, true for what is to be detected.
        hidden: Width of the hidden layer.
        epochs: Passes over the data.
        seed: Of the weights and the order of the samples; the global random state is left alone.
    """
    with torch.random.fork_rng(devices=[]), _quiet(), _one_thread():
        torch.manual_seed(seed)
        detector = Detector(features.shape[1], hidden)
        batch_size = max(32, math.ceil(len(features) / STEPS))
        loader = DataLoader(TensorDataset(features, labels.double()), batch_size, shuffle=True)
        # A trainer of its own, in one process, also inside another trainer's run under several processes.
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=epochs, barebones=True, plugins=[LightningEnvironment()]
        )
        trainer.fit(detector, loader)
    return detector.eval()


def cross_validated_auroc(
    features: Tensor, labels: Tensor, folds: int, hidden: int = 32, epochs: int = 30, seed: int = 0
) -> Tensor:
    """AUROC on each fold of a detector trained on the others, ``(folds,)``.

    Raises:
        ValueError: If a class has fewer samples than there are folds.
    """
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold

    smallest = int(min(labels.sum(), (~labels).sum()))
    if not 2 <= folds <= smallest:
        raise ValueError(
            f"folds is {folds}; it must lie between 2 and {smallest}, the number of samples of the smaller class"
        )
    found = []
    for inside, outside in StratifiedKFold(folds, shuffle=True, random_state=seed).split(features, labels):
        detector = train_detector(features[inside], labels[inside], hidden, epochs, seed)
        with torch.no_grad():
            found.append(float(roc_auc_score(labels[outside], detector(features[outside]))))
    return torch.tensor(found, dtype=torch.float64)


@contextmanager
def _one_thread() -> Iterator[None]:
    """On one thread: the steps are so small that threads only wait for each other, and the sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning says of a trainer: this one is a detail."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings(
                "ignore", message=".*(GPU available but not used|does not have many workers|LeafSpec).*"
            )
            yield
    finally:
        logger.setLevel(level)
