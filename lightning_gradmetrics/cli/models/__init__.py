"""Models of the command."""

from lightning_gradmetrics.cli.models.classifier import Classifier
from lightning_gradmetrics.cli.models.digits_cnn import digits_cnn
from lightning_gradmetrics.cli.models.libraries import huggingface_model, lightning_model, timm_model
from lightning_gradmetrics.cli.models.resnet_cifar import ResNetCifar, resnet20_cifar
from lightning_gradmetrics.cli.models.torchvision_model import torchvision_model

__all__ = [
    "Classifier",
    "ResNetCifar",
    "digits_cnn",
    "huggingface_model",
    "lightning_model",
    "resnet20_cifar",
    "timm_model",
    "torchvision_model",
]
