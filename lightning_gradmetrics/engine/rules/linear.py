"""Linear layers, and products with a matrix of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_gradmetrics.engine.kernels import PositionTotals, onednn
from lightning_gradmetrics.engine.rules.base import Call, all_but_last, rule
from lightning_gradmetrics.engine.rules.sums import of_product
from lightning_gradmetrics.engine.uses import LinearUse, OuterUse, RowsUse, Use

__all__ = ["linear", "product"]


def _sequence(tensor: Tensor) -> Tensor:
    """Return ``(N, times, *others, D)`` as ``(N, T, D)``."""
    if tensor.ndim == 3:
        return tensor
    return tensor.reshape(tensor.shape[0], tensor.shape[1:-1].numel(), tensor.shape[-1])


def _has_positions(values: dict[str, Any]) -> bool:
    """Return whether the input has positions; torch multiplies a strided one slice by slice if the weight is frozen."""
    return bool(values["input"].ndim > 2)


def _inner_axis(call: Call) -> bool:
    """Return whether the samples are on the same axis of input and output, and not on the contracted axis."""
    ndim = call.values["input"].ndim
    return call.axis == call.out and call.axis.dim < ndim - 1


def _run_linear(values: dict[str, Any]) -> Tensor:
    x, weight, bias = values["input"], values["weight"], values.get("bias")
    return onednn.linear(x, weight, bias) if onednn.computes(x, weight) else F.linear(x, weight, bias)


def _run_product(values: dict[str, Any]) -> Tensor:
    x, weight = values["input"], values["weight"]
    return onednn.linear(x, weight.t(), None) if onednn.computes(x, weight) else torch.matmul(x, weight)


def _run_affine(values: dict[str, Any]) -> Tensor:
    x, weight, bias = values["input"], values["weight"], values["bias"]
    if onednn.computes(x, weight) and len(bias) == weight.shape[1]:
        return onednn.linear(x, weight.t(), bias)
    return torch.addmm(bias, x, weight)


@rule(
    F.linear,
    arguments="input weight bias",
    weights="weight bias",
    accepts=_inner_axis,
    dense=_has_positions,
    run=_run_linear,
    row_axes=all_but_last,
    takes_rows=True,
    sums=of_product,
)
def linear(call: Call, g: Tensor) -> Iterator[tuple[str, Use]]:
    """``y = a W^T + b``: the weight's gradient is ``sum_t g_t a_t^T``, the bias' ``sum_t g_t``."""
    if g.ndim == 2:
        if "bias" in call.slots:
            yield "bias", RowsUse(g)
        if "weight" in call.slots:
            yield "weight", OuterUse(g, call.values["input"].to(g.dtype))
        return
    yield from _with_positions(call, _sequence(g), transposed=False)


def _with_positions(call: Call, g: Tensor, transposed: bool) -> Iterator[tuple[str, Use]]:
    """Yield the uses of weight and bias from ``g`` ``(N, T, O)``; the kernel of the weight's moments may sum ``g`` over the positions."""
    totals = PositionTotals() if "bias" in call.slots and g.shape[1] > 1 else None
    if "weight" in call.slots:
        yield "weight", LinearUse(_sequence(call.x).to(g.dtype), g, transposed, totals)
    if "bias" not in call.slots:
        return
    if totals is None:
        yield "bias", RowsUse(g.squeeze(1))
    else:
        yield "bias", RowsUse(totals.rows(g.mT))


def _matrix(call: Call) -> bool:
    """Return whether an input with rows is multiplied by one matrix of parameters."""
    return _inner_axis(call) and call.values["weight"].ndim == 2 and call.get("alpha", 1) == 1 == call.get("beta", 1)


@rule(
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.mm,
    Tensor.mm,
    arguments="input weight",
    weights="weight",
    accepts=_matrix,
    dense=_has_positions,
    run=_run_product,
    row_axes=all_but_last,
    sums=of_product,
)
def product(call: Call, g: Tensor) -> Iterator[tuple[str, Use]]:
    """``y = a W``: the gradient is ``sum_t a_t g_t^T``."""
    g = _sequence(g)
    yield "weight", LinearUse(_sequence(call.x).to(g.dtype), g, transposed=True)


def _affine(call: Call) -> bool:
    return _matrix(call) and call.values["bias"].ndim == 1


@rule(
    torch.addmm,
    arguments="bias input weight beta alpha",
    weights="weight bias",
    accepts=_affine,
    run=_run_affine,
    row_axes=all_but_last,
    sums=of_product,
)
def affine(call: Call, g: Tensor) -> Iterator[tuple[str, Use]]:
    """``y = b + a W``."""
    yield from _with_positions(call, _sequence(g), transposed=True)
