"""Explains errors of a model that come from the types or the values of its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["problem_of"]


def problem_of(model: nn.Module, tensors: list[Tensor], error: str = "") -> str:
    """Return why a model cannot take some inputs; ``""`` if their types and values show no reason.

    Args:
        model: The model.
        tensors: The tensors in its inputs.
        error: What the model's error says.

    Example:
        >>> problem_of(nn.Sequential(nn.Embedding(5, 2)), [torch.tensor([[1, 7]])])
        "an input has ids from 1 to 7, and the largest embedding '0' has rows for 0 to 4: replace the ids outside of it"
        >>> problem_of(nn.Linear(2, 3), [torch.tensor([[1, 7]])])
        'an input is torch.int64, and the parameters of Linear are torch.float32: convert it, as in inputs.float()'
    """
    tables = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    if not tables:
        return _other_type(model, tensors)
    if "same dtype" in error:  # of a product: no embedding has raised it
        return _other_type(model, tensors)
    ids = [tensor for tensor in tensors if tensor.dtype in (torch.int32, torch.int64) and tensor.numel()]
    if not ids:
        name = next(iter(tables))
        return f"the embedding {name!r} takes ids, and no input is torch.int64: convert them, as in inputs.long()"
    for tensor in ids:
        problem = _outside(tensor, tables)
        if problem:
            return problem
    return ""


def _outside(ids: Tensor, tables: dict[str, Any]) -> str:
    """Return a description of ids outside of the largest embedding; an empty string if there are none."""
    name = max(tables, key=lambda key: tables[key].num_embeddings)
    rows, least, most = tables[name].num_embeddings, int(ids.min()), int(ids.max())
    if least >= 0 and most < rows:
        return ""
    return (
        f"an input has ids from {least} to {most}, and the largest embedding {name!r} has rows for 0 to {rows - 1}: replace the "
        "ids outside of it"
    )


def _other_type(model: nn.Module, tensors: list[Tensor]) -> str:
    """Return a description of inputs whose type differs from that of the parameters; an empty string otherwise."""
    parameter = next(model.parameters(), None)
    if parameter is None or not parameter.is_floating_point() or not tensors:
        return ""
    if any(tensor.dtype == parameter.dtype for tensor in tensors):
        return ""
    conversion = {torch.float32: "inputs.float()", torch.float64: "inputs.double()", torch.float16: "inputs.half()"}
    example = conversion.get(parameter.dtype, f"inputs.to({parameter.dtype})")
    return (
        f"an input is {tensors[0].dtype}, and the parameters of {type(model).__name__} are {parameter.dtype}: convert it, as in "
        f"{example}"
    )
