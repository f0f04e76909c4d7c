"""Tensors whose entries are entries of a parameter: reordered ones, and those that an index selects, as in a table of positions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gradmetrics.engine.kernels.operators import reads_are_slow

__all__ = ["Selection", "rearranges", "selection_of"]


def _nodes(names: str) -> frozenset[str]:
    return frozenset(name + "Backward0" for name in names.split())


ORDERS = _nodes("Alias Clone Permute ReshapeAlias Squeeze T Transpose Unsqueeze UnsafeView View")
"""Nodes of autograd graphs that keep every entry and change only the shape or the order."""

CHOICES = _nodes("Embedding Expand Gather Index IndexSelect Select Slice") | ORDERS
"""Nodes each of whose entries is one entry of their argument."""

LARGEST = 2**24
"""Largest number of entries of a parameter; float32 contains each integer up to it."""


def _leaf(derived: Tensor, names: Iterable[str]) -> Tensor | None:
    """Return the leaf of a tensor's graph, if the graph is a chain of nodes with these names."""
    node: Any = derived.grad_fn
    while node is not None and node.name() in names:
        following = [function for function, _ in node.next_functions if function is not None]
        is_weighted = getattr(node, "_saved_scale_grad_by_freq", False) or getattr(node, "_saved_sparse", False)
        node = None if is_weighted or len(following) != 1 else following[0]
    return getattr(node, "variable", None)


def rearranges(derived: Tensor, parameter: Tensor) -> bool:
    """Return whether a tensor contains each entry of a parameter exactly once."""
    return _leaf(derived, ORDERS) is parameter and derived.numel() == parameter.numel()


@dataclass(frozen=True)
class Selection:
    """The entries of a parameter that a tensor consists of.

    Args:
        entries: For each entry of the tensor the index of that of the parameter plus one, ``(D,)``; zero if it has no gradient.
        size: The number of entries of the parameter.
    """

    entries: Tensor
    size: int

    def touched(self, rows: Tensor) -> Tensor:
        """Return the gradients of the selected entries, in any order, and a zero if there are others.

        Args:
            rows: The gradients of the tensor, ``(N, D)``.

        Returns:
            ``(N, E)``, with ``E`` at most one more than the number of selected entries.
        """
        is_selected = torch.zeros(self.size + 1, dtype=torch.bool)
        is_selected[self.entries] = True
        is_selected[0] = True  # the column of all entries without a gradient
        columns = is_selected.cumsum(0) - 1
        selected = int(columns[-1])
        if selected == rows.shape[1]:  # each entry once
            return rows if selected == self.size else F.pad(rows, (1, 0))
        sums = rows.new_zeros(len(rows), selected + 1)
        sums.scatter_add_(1, columns[self.entries].expand_as(rows), rows)
        sums[:, 0] = 0
        return sums[:, 1:] if selected == self.size else sums


def selection_of(derived: Tensor, parameter: Tensor) -> Selection | None:
    """Return the entries of a parameter that a tensor consists of; ``None`` if they are not known without waiting for a device.

    Args:
        derived: A tensor with a graph.
        parameter: The leaf of that graph.
    """
    is_exact = parameter.dtype == derived.dtype in (torch.float32, torch.float64) and parameter.numel() < LARGEST
    if not is_exact or reads_are_slow(derived) or _leaf(derived, CHOICES) is not parameter:
        return None
    with torch.enable_grad():
        outer = torch.zeros_like(derived, requires_grad=True)
        (pulled,) = torch.autograd.grad(derived, parameter, outer, create_graph=True)
        numbers = torch.arange(1, parameter.numel() + 1, dtype=parameter.dtype).view_as(parameter)
        # The gradient is linear in the outer gradient, so this is the tensor that is derived from the numbers.
        (entries,) = torch.autograd.grad(pulled, outer, numbers)
    return Selection(entries.long().flatten(), parameter.numel())
