"""Finds samples with NaN or Inf."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.classifier.forward import Inputs, tensors_in

__all__ = ["finite_rows"]


def finite_rows(inputs: Inputs | None, others: Iterable[Tensor], size: int) -> Tensor:
    """Return which samples have no NaN or Inf in their inputs and in ``others``: ``(N,)``, bool.

    Args:
        inputs: The model's inputs; tensors without one row per sample are ignored.
        others: Further tensors ``(N, ...)``.
        size: The number of samples ``N``.
    """
    if not size:  # a step may leave out all samples of a batch
        return torch.ones(0, dtype=torch.bool)
    flags: list[Tensor] = []
    columns: list[Tensor] = []
    tensors: list[Tensor] = []
    matrices: list[Tensor] = []
    for argument in _arguments(inputs):
        if _is_one_tensor_per_sample(argument, size):
            flags.append(torch.stack([sample.detach().isfinite().all() for sample in argument]))
        else:
            tensors += tensors_in(argument)
    for tensor in (*tensors, *others):
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.detach().resolve_conj())
        if not tensor.is_floating_point() or not tensor.ndim or len(tensor) != size:
            continue
        if tensor.ndim == 1:
            columns.append(tensor.detach())
        else:
            matrices.append(tensor.detach().reshape(size, -1))
    joined = [torch.stack(columns)] if columns else []
    if not flags and all(map(_has_finite_sum, (*matrices, *joined))):
        return torch.ones(size, dtype=torch.bool)
    flags += map(_rows_without_nan, matrices)
    for values in joined:
        flags.append(values.isfinite().all(0))
    return torch.stack(flags).all(0)


def _arguments(inputs: Inputs | None) -> Iterable[Any]:
    """Return the arguments of a call."""
    if isinstance(inputs, Mapping):
        return inputs.values()
    return inputs if isinstance(inputs, tuple) else [inputs]


def _is_one_tensor_per_sample(argument: Any, size: int) -> bool:
    """Return whether an argument is a list of N tensors, such as images of several sizes."""
    is_list = isinstance(argument, list) and len(argument) == size > 0
    return is_list and all(isinstance(sample, Tensor) for sample in argument)


def _has_finite_sum(tensor: Tensor) -> bool:
    """Return whether the sum of a tensor on the CPU is finite, which proves that all entries are; an overflow does not."""
    return tensor.device.type == "cpu" and math.isfinite(float(tensor.sum()))


def _rows_without_nan(rows: Tensor) -> Tensor:
    """Return which rows are free of NaN and Inf. A finite sum proves it in one pass; any other sum may be an overflow."""
    if rows.device.type != "cpu":  # without a synchronisation
        return rows.isfinite().all(1)
    is_finite = rows.sum(1).isfinite()
    return is_finite if bool(is_finite.all()) else rows.isfinite().all(1)
