"""Models of timm and Hugging Face by name, and a LightningModule from its checkpoint."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lightning_gradmetrics.cli.errors import unknown_name
from lightning_gradmetrics.cli.models.classifier import Classifier, load_weights

__all__ = ["huggingface_model", "lightning_model", "timm_model"]

AUTO_CLASSES = {"image": "AutoModelForImageClassification", "text": "AutoModelForSequenceClassification"}


def timm_model(
    name: str, checkpoint: str | None = None, pretrained: bool = False, classes: int | None = None
) -> Classifier:
    """Return a model of timm by name.

    Args:
        name: One of ``timm.list_models()``, such as ``resnet18``.
        checkpoint: A state dict on disk.
        pretrained: Whether to download published weights.
        classes: The number of classes; ``None`` keeps the model's.

    Raises:
        ImportError: If timm is not installed.
        ValueError: If timm has no model of that name.
    """
    timm = _imported("timm", "timm")
    if name.partition(".")[0] not in timm.list_models():
        raise ValueError(unknown_name("timm model", name, timm.list_models()))
    options = {} if classes is None else {"num_classes": classes}
    network = timm.create_model(name, pretrained=pretrained, **options)
    if checkpoint is not None:
        load_weights(network, checkpoint)
    return Classifier(network).eval()


def huggingface_model(name: str, kind: str = "image") -> nn.Module:
    """Return a classifier of Hugging Face's transformers.

    Args:
        name: A folder written by ``save_pretrained``, or a name on the hub, which is downloaded.
        kind: ``image`` or ``text``.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the kind is unknown.
        OSError: If there is no such model.
    """
    if kind not in AUTO_CLASSES:
        raise ValueError(unknown_name("kind", kind, AUTO_CLASSES))
    auto_class = getattr(_imported("transformers", "transformers"), AUTO_CLASSES[kind])
    return Classifier(auto_class.from_pretrained(name)).eval()


def lightning_model(class_path: str, checkpoint: str, arguments: Mapping[str, Any] | None = None) -> LightningModule:
    """Return a LightningModule with the weights of a checkpoint written by a ``Trainer``.

    Args:
        class_path: The dotted path of the class, such as ``mine.Model``.
        checkpoint: The ``.ckpt`` file.
        arguments: Arguments of the class that are not in the checkpoint.

    Raises:
        ValueError: If the class cannot be imported, or is not a LightningModule.
        FileNotFoundError: If the checkpoint does not exist.
    """
    module, _, name = class_path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model.class_path={class_path} cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, LightningModule)):
        raise ValueError(f"model.class_path={class_path} is not a LightningModule")
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {checkpoint!r}: give the path of a .ckpt file")
    return kind.load_from_checkpoint(path, map_location="cpu", **(arguments or {})).eval()


def _imported(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this model needs {name}: pip install 'lightning-gradmetrics[{extra}]'") from error
