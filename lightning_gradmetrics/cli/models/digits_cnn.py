"""The small convolutional network of the default run; weights for the default settings come with the package."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradmetrics.cli.data.sets import EvaluationData
from lightning_gradmetrics.cli.models.classifier import Classifier
from lightning_gradmetrics.cli.progress import notice, trainer_progress
from lightning_gradmetrics.results.replacing import replaced

__all__ = ["digits_cnn", "network"]

SHIPPED_WEIGHTS = Path(__file__).with_name("digits_cnn.safetensors")
"""The weights of the default settings, made by :func:`train_shipped_weights`."""

FINGERPRINT = "fingerprint"


def network(classes: int, width: int = 16) -> nn.Sequential:
    """Return three convolutions with batch norm, global average pooling and a linear head, for grey images.

    Args:
        classes: The number of classes.
        width: The number of channels of the first convolution.
    """
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
    checkpoint_folder: str | None = None,
    retrain: bool = False,
    width: int = 16,
    epochs: int = 12,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> Classifier:
    """Return the network with weights for ``data.train``: from the package, from an earlier run, or newly trained.

    Weights are identified by a fingerprint of the settings and the training data. For the default settings they come
    with the package, so that the results do not depend on the CPU used for training.

    Args:
        data: Data with training images.
        checkpoint_folder: The folder where trained weights are stored, one file per fingerprint; ``None`` stores none.
        retrain: Train even if weights are available.
        width: The number of channels of the first convolution.
        epochs: The number of passes over the training data, at least 1.
        learning_rate: The learning rate of Adam.
        seed: The seed of the weights and of the order of the samples.

    Raises:
        ValueError: If the data has no training images, or ``epochs`` is below 1.
    """
    if data.train is None:
        raise ValueError(
            "model=digits_cnn is trained in the run, and the data has no training set: choose another model"
        )
    if epochs < 1:
        raise ValueError(f"model.epochs must be at least 1, got {epochs}")
    fingerprint = _fingerprint(data, width, epochs, learning_rate, seed)
    stored = None if checkpoint_folder is None else Path(checkpoint_folder) / f"digits_cnn-{fingerprint}.safetensors"
    seed_everything(seed, verbose=False)
    model = Classifier(network(len(data.classes), width), learning_rate)
    if not retrain:
        for path in (SHIPPED_WEIGHTS, *([] if stored is None else [stored])):
            if _load(model.network, path, fingerprint):
                return model.eval()
    _train(model, data, epochs)
    if stored is not None:
        _save(model.network, stored, fingerprint)
    return model.eval()


def _load(module: nn.Module, path: Path, fingerprint: str) -> bool:
    """Load the weights of a file if their fingerprint matches; a damaged file is reported and ignored."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            if (file.metadata() or {}).get(FINGERPRINT) != fingerprint:
                return False
        weights = load_file(path)
    except SafetensorError as error:
        notice(f"digits_cnn: {path.name} is damaged ({error}); training again")
        return False
    module.load_state_dict(weights)
    where = "the package" if path == SHIPPED_WEIGHTS else os.path.relpath(path)
    notice(f"digits_cnn: weights loaded from {where}")
    return True


def _train(model: Classifier, data: EvaluationData, epochs: int) -> None:
    assert data.train is not None
    notice(f"digits_cnn: training for {epochs} epochs")
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **trainer_progress(),
    )
    trainer.fit(model, DataLoader(data.train, batch_size=32, shuffle=True))


def _save(module: nn.Module, path: Path, fingerprint: str) -> None:
    with replaced(path) as temporary:
        save_file(module.state_dict(), temporary, {FINGERPRINT: fingerprint})


def _fingerprint(data: EvaluationData, *settings: object) -> str:
    """Return a hash of the settings and the training data."""
    assert data.train is not None
    digest = hashlib.sha256(repr(settings).encode())
    for index in range(len(data.train)):  # type: ignore[arg-type]
        inputs, label = data.train[index]
        digest.update(inputs.numpy().tobytes() + bytes([int(label)]))
    return digest.hexdigest()[:12]


def train_shipped_weights() -> None:
    """Train the default network and write the weights that come with the package."""
    from lightning_gradmetrics.cli.data.digits import digits

    data = digits()
    model = digits_cnn(data, retrain=True)
    _save(model.network, SHIPPED_WEIGHTS, _fingerprint(data, 16, 12, 3e-3, 0))
