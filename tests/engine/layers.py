"""A layer in a model, its per-sample gradients against the reference."""

from __future__ import annotations

import warnings

import torch
from hypothesis import strategies as st
from torch import nn

from lightning_gradmetrics.engine import gradient_statistics
from tests.engine.cases import worst_difference

__all__ = ["SIZES", "Summed", "check_layer", "normal"]

SIZES = st.integers(1, 4)


class Summed(nn.Module):
    """A layer, and logits that weigh each entry of its output differently."""

    def __init__(self, layer: nn.Module, take: int | None = None) -> None:
        super().__init__()
        self.layer, self.take = layer, take

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        out = self.layer(*inputs)
        out = (out if self.take is None else out[self.take]).flatten(1)
        weights = torch.arange(1.0, 1 + out.shape[1], dtype=out.dtype).sin()
        return torch.stack([(out * weights).sum(1), (out.square() * weights).sum(1), out.tanh().sum(1)], 1)


def check_layer(layer: nn.Module, *inputs: torch.Tensor, take: int | None = None) -> None:
    model = Summed(layer.double(), take).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*padding='same' with even kernel.*")
        objectives = ["pseudo_label", "uniform"]
        found = gradient_statistics(model, inputs, objectives, per_parameter=True)
        expected = gradient_statistics(model, inputs, objectives, per_parameter=True, engine="reference")
    for one, other in zip(found, expected, strict=True):
        assert worst_difference(one, other) < 1e-9


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)
