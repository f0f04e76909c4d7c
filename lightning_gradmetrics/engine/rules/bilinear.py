"""Bilinear layers, expressed as a linear layer of the outer product of the two inputs."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from lightning_gradmetrics.engine.tracing.calls import DECOMPOSED

__all__ = ["bilinear"]


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y_o = sum_ij x_i W_oij z_j + b_o``, with the arguments and the result of :func:`torch.nn.functional.bilinear`."""
    products = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)
    return F.linear(products, weight.flatten(1), bias)


DECOMPOSED[F.bilinear] = bilinear
