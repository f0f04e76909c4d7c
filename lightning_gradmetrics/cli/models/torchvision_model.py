"""Classification models of torchvision."""

from __future__ import annotations

from lightning_gradmetrics.cli.errors import unknown_name
from lightning_gradmetrics.cli.models.classifier import Classifier, load_weights

__all__ = ["torchvision_model"]


def torchvision_model(
    name: str, checkpoint: str | None = None, weights: str | None = None, classes: int = 1000
) -> Classifier:
    """Return a torchvision model by name.

    Args:
        name: A name in ``torchvision.models``, such as ``resnet18``.
        checkpoint: A state dict on disk.
        weights: Published weights that torchvision downloads, such as ``DEFAULT``.
        classes: The number of classes, unless ``weights`` are given.

    Raises:
        ImportError: If torchvision is not installed.
        ValueError: If torchvision has no model of that name.
    """
    try:
        import torchvision.models
        from torchvision.models import get_model, list_models
    except ImportError as error:
        raise ImportError("model=torchvision needs torchvision: pip install 'lightning-gradmetrics[vision]'") from error
    if name not in list_models():
        raise ValueError(unknown_name("torchvision model", name, list_models(torchvision.models)))
    network = get_model(name, weights=weights) if weights else get_model(name, weights=None, num_classes=classes)
    if checkpoint is not None:
        load_weights(network, checkpoint)
    return Classifier(network).eval()
