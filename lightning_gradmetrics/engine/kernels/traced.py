"""Tells when the moments of a layer are an operator of a traced graph, and translates their keys.

Such an operator chooses between the compiled kernels when the graph runs. Inductor would write each sample's weight gradient
to memory, and a graph cannot depend on the values of tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.operators import is_traced, operator
from lightning_gradmetrics.gradients.statistics import Moment, Moments

__all__ = ["in_graph", "key_names", "keys_of", "looked_up", "named_moments", "stacked_by_name"]


def in_graph(g: Tensor) -> bool:
    """Return whether the moments of a layer with this gradient ``(N, ...)`` of its output are one operator."""
    return is_traced() and g.is_cpu and g.numel() > 0


def key_names(wanted: Iterable[Moment]) -> str:
    """Return the names of moments in a fixed order, as an argument of an operator.

    Example:
        >>> key_names({"sum", 2.0})
        '2.0 sum'
    """
    return " ".join(sorted(map(str, wanted)))


@lru_cache
def keys_of(names: str) -> tuple[Moment, ...]:
    """Return the moments of :func:`key_names`, in the same order."""
    return tuple(map(_key, names.split()))


def stacked_by_name(moments: Moments, names: str) -> Tensor:
    """Return moments ``(N,)`` as the rows of ``(K, N)``, in the order of their names."""
    return torch.stack(list(map(moments.__getitem__, keys_of(names))))


def named_moments(rows: Tensor, names: str) -> Moments:
    """Return the moments from the rows ``(K, N)`` of :func:`stacked_by_name`."""
    return dict(zip(keys_of(names), rows.unbind(), strict=True))


def looked_up(table: Tensor, indices: Tensor, *_: object) -> Tensor:
    """Return rows of a table, for a graph on a CPU: inductor computes them an entry at a time."""
    return _looked_up(table, indices)


@operator(
    "(Tensor table, Tensor indices) -> Tensor", lambda table, indices: table.new_empty(*indices.shape, table.shape[1])
)
def _looked_up(table: Tensor, indices: Tensor) -> Tensor:
    return torch.embedding(table, indices)


def _key(name: str) -> Moment:
    return cast(Moment, name) if name in ("sum", "max", "min") else float(name)
