"""The small convolutional network of the default experiment: trained in seconds, kept, and used again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradmetrics.cli.data.sets import EvaluationData
from lightning_gradmetrics.cli.models.classifier import Classifier, load_weights

__all__ = ["digits_cnn", "network"]


def network(classes: int, width: int = 16) -> nn.Sequential:
    """Two convolutions with batch norm, global average pooling and a linear head, for grey images."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(4 * width),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


def digits_cnn(
    data: EvaluationData,
    checkpoint: str | None = None,
    width: int = 16,
    epochs: int = 12,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> Classifier:
    """The network trained on ``data.train``, or loaded where the same one was trained before.

    Args:
        data: Data with training images.
        checkpoint: The folder that trained weights are kept in, one file for each setting; ``None`` keeps none.
        width: Channels of the first convolution.
        epochs: Passes over the training data.
        learning_rate: Of Adam.
        seed: Of the weights and of the order of the samples.

    Raises:
        ValueError: If the data hold no training images.
    """
    if data.train is None:
        raise ValueError(
            "this model is trained on the spot, and the data hold no training set: choose data=digits, or another model"
        )
    seed_everything(seed, verbose=False)
    model = Classifier(network(len(data.classes), width), learning_rate)
    kept = (
        None
        if checkpoint is None
        else Path(checkpoint) / f"digits_cnn-{_fingerprint(data, width, epochs, learning_rate, seed)}.pt"
    )
    if kept is not None and kept.is_file():
        load_weights(model.network, kept)
        return model.eval()
    loader = DataLoader(data.train, batch_size=32, shuffle=True)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(model, loader)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.network.state_dict(), kept)
    return model.eval()


def _fingerprint(data: EvaluationData, *settings: object) -> str:
    """Of the settings and the training data: another one means another file."""
    assert data.train is not None
    digest = hashlib.sha256(repr(settings).encode())
    for inputs, label in (data.train[i] for i in range(len(data.train))):  # type: ignore[arg-type]
        digest.update(inputs.numpy().tobytes() + bytes([int(label)]))
    return digest.hexdigest()[:12]
