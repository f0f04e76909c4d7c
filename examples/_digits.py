"""
Shared code
===========

Data loaders of handwritten digits, and a small Lightning classifier of the digits 0 to 7.
"""

from __future__ import annotations

import warnings

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

IGNORED_WARNINGS = (
    "does not have many workers",
    "isinstance\\(treespec",
    "You defined a `validation_step`",
)
for message in IGNORED_WARNINGS:
    warnings.filterwarnings("ignore", f".*{message}.*")


def digit_loaders() -> dict[str, DataLoader[tuple[Tensor, ...]]]:
    """Return loaders: training, held-out and test digits (0 to 7), and unknown digits (8 and 9)."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    digits = TensorDataset(pixels, torch.tensor(labels))
    known = [index for index, label in enumerate(labels) if label < 8]
    unknown = [index for index, label in enumerate(labels) if label >= 8]
    splits = {
        "train": known[:150],
        "held_out": known[150:500],
        "test": known[500:],
        "unknown": unknown,
    }
    loaders = {}
    for name, indices in splits.items():
        loaders[name] = DataLoader(Subset(digits, indices), batch_size=64)
    return loaders


class DigitClassifier(LightningModule):
    """A small convolutional network with the usual steps; it does not use this package."""

    def __init__(self, learning_rate: float = 0.01) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 32),
            nn.ReLU(),
            nn.Linear(32, 8),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, 8)``."""
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Run the model; the callback scores this call."""
        self(batch[0])

    def test_step(
        self,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Run the model; the callback scores this call."""
        self(batch[0])

    def predict_step(
        self,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> Tensor:
        """Return the predicted classes."""
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimiser."""
        return torch.optim.Adam(self.parameters(), self.learning_rate)


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Trainer arguments that all examples share."""


def trained_classifier(loaders: dict[str, DataLoader[tuple[Tensor, ...]]]) -> DigitClassifier:
    """Return a classifier trained for 15 epochs."""
    seed_everything(0, verbose=False)
    model = DigitClassifier()
    Trainer(max_epochs=15, enable_checkpointing=False, **QUIET).fit(model, loaders["train"])
    return model
