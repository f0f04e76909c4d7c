"""Sums of products with a parameter (einsum), written as a linear layer if they are equivalent to one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradmetrics.engine.tracing.calls import DECOMPOSED, opened

__all__ = ["einsum"]


@dataclass(frozen=True)
class _Labels:
    """The labels of a product of samples and a parameter.

    Args:
        input: The labels of the tensor with the samples.
        weight: The labels of the parameter.
        output: The labels of the result.
    """

    input: str
    weight: str
    output: str

    @property
    def contracted(self) -> str:
        """The labels that are summed over."""
        return "".join(label for label in self.input if label in self.weight)

    def kept(self, labels: str) -> str:
        """Return the labels of one factor that the result has."""
        return "".join(label for label in labels if label not in self.contracted)

    def linear(self) -> bool:
        """Return whether the product is a linear layer: labels are unique in each factor, and either contracted or in the output."""
        factors = (self.input, self.weight, self.output)
        if not self.contracted or any(len(set(labels)) < len(labels) for labels in factors):
            return False
        return sorted(self.output) == sorted(self.kept(self.input) + self.kept(self.weight))


def einsum(*arguments: Any) -> Tensor:
    """Return a sum of products, with the arguments and the result of :func:`torch.einsum`."""
    equation, operands = arguments[0], arguments[1:]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if isinstance(equation, str) and len(operands) == 2:
        for x, weight, order in ((*operands, 1), (*operands[::-1], -1)):
            labels = _parsed(equation, order)
            if labels is not None and _is_parameter(weight) and not _is_parameter(x) and labels.linear():
                return _linear(x, weight, labels)
    result: Tensor = opened(torch.einsum)(*arguments)
    return result


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _parsed(equation: str, order: int) -> _Labels | None:
    """Return the labels of an explicit equation of two factors, with the second factor first if ``order`` is -1."""
    factors, arrow, output = equation.replace(" ", "").partition("->")
    labels = factors.split(",")[::order]
    if not arrow or len(labels) != 2 or "." in equation:
        return None
    return _Labels(labels[0], labels[1], output)


def _linear(x: Tensor, weight: Tensor, labels: _Labels) -> Tensor:
    """Return the product as a linear layer over the contracted labels."""
    inner, outer = labels.contracted, labels.kept(labels.weight)
    rows = _ordered(x, labels.input, labels.kept(labels.input) + inner)
    matrix = _ordered(weight, labels.weight, outer + inner)
    sizes = matrix.shape[: len(outer)]
    product = F.linear(rows.flatten(-len(inner)), matrix.reshape(sizes.numel(), -1))
    spread = product.reshape(*product.shape[:-1], *sizes)
    return _ordered(spread, labels.kept(labels.input) + outer, labels.output)


def _ordered(tensor: Tensor, labels: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """Return the axes in another order."""
    if list(labels) == list(wanted):
        return tensor
    return tensor.permute([labels.index(label) for label in wanted])


DECOMPOSED[torch.einsum] = einsum
