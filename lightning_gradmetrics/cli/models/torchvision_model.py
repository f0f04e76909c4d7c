"""Any classification model of torchvision."""

from __future__ import annotations

from typing import Any

from lightning_gradmetrics.cli.models.classifier import Classifier, load_weights

__all__ = ["torchvision_model"]


def torchvision_model(
    name: str, checkpoint: str | None = None, weights: str | None = None, classes: int = 1000, data: Any = None
) -> Classifier:
    """A torchvision model by name.

    Args:
        name: As in ``torchvision.models``, for instance ``resnet18``.
        checkpoint: A state dict on disk.
        weights: Published weights that torchvision downloads, for instance ``DEFAULT``.
        classes: Number of classes, where there are no published weights.

    Raises:
        ImportError: If torchvision is not installed.
        ValueError: If there is no such model.
    """
    try:
        from torchvision.models import get_model, list_models
    except ImportError as error:
        raise ImportError("models of torchvision need it: pip install 'lightning-gradmetrics[vision]'") from error
    known = [n for n in list_models() if "_" not in n[:4] or n.startswith(("vit_", "swin_"))]
    if name not in list_models():
        raise ValueError(f"torchvision has no model {name!r}; it has, among others: {', '.join(known[:20])}")
    network = get_model(name, weights=weights) if weights else get_model(name, weights=None, num_classes=classes)
    if checkpoint is not None:
        load_weights(network, checkpoint)
    return Classifier(network).eval()
