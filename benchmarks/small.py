"""Compare the engine and other software with a training step, on small models, small batches and recurrent layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.models import resnet20
from benchmarks.steps import Case, compare

__all__ = ["CASES", "main"]


def mlp(norm: bool = False) -> nn.Module:
    """Return a network for tables with 16 columns and 3 classes; it has three hidden layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((16, 64), (64, 64), (64, 32)):
        layers.append(nn.Linear(inputs, outputs))
        if norm:
            layers.append(nn.BatchNorm1d(outputs))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(32, 3))


class _Splines(nn.Module):
    """A Kolmogorov-Arnold layer: sums of radial basis functions of each input."""

    def __init__(self, inputs: int, outputs: int, bases: int = 8) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(0.1 * torch.randn(outputs, inputs, bases))
        self.scale = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.register_buffer("centres", torch.linspace(-2, 2, bases))

    def forward(self, x: Tensor) -> Tensor:
        bases = torch.exp(-((x[..., None] - self.centres) ** 2))
        smooth = torch.einsum("nib,oib->no", bases, self.coefficients)
        return smooth + torch.einsum("ni,oi->no", nn.functional.silu(x), self.scale)


def kan() -> nn.Module:
    """Return a Kolmogorov-Arnold network; its parameters are used in einsum, outside torch layers."""
    return nn.Sequential(_Splines(8, 16), _Splines(16, 4))


def small_cnn() -> nn.Module:
    """Return two convolutions with 16 channels and a linear layer, for 8x8 images."""
    convolutions = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(1024, 10))


class _MeanOfEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(2000, 32), nn.Linear(32, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.table(tokens).mean(1))
        return logits


def fast_text() -> nn.Module:
    """Return an embedding bag (mean) and a linear layer."""
    return nn.Sequential(nn.EmbeddingBag(20000, 64), nn.Linear(64, 4))


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layers, self.head = kind(64, 256, 2, batch_first=True), nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(x)[0][:, -1])
        return logits


CASES: dict[str, Case] = {
    "MLP, 32": (mlp, (32, 16), 0),
    "MLP, 1024": (mlp, (1024, 16), 0),
    "MLP with batch norm, 32": (lambda: mlp(norm=True), (32, 16), 0),
    "MLP with batch norm, 1024": (lambda: mlp(norm=True), (1024, 16), 0),
    "KAN, 1024": (kan, (1024, 8), 0),
    "CNN 8x8, 64": (small_cnn, (64, 1, 8, 8), 0),
    "CNN 8x8, 512": (small_cnn, (512, 1, 8, 8), 0),
    "fastText, 32 x 20": (fast_text, (32, 20), 20000),
    "mean of embeddings, 32 x 20": (_MeanOfEmbeddings, (32, 20), 2000),
    "ResNet-20, 1": (resnet20, (1, 3, 32, 32), 0),
    "ResNet-20, 8": (resnet20, (8, 3, 32, 32), 0),
    "LSTM 2 x 256, 16 x 64": (lambda: _Recurrent(nn.LSTM), (16, 64, 64), 0),
    "GRU 2 x 256, 16 x 64": (lambda: _Recurrent(nn.GRU), (16, 64, 64), 0),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write a JSON file."""
    compare("small", __doc__, CASES, arguments)
