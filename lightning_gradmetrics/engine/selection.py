"""Tensors whose entries are entries of a parameter: reordered ones, and those that an index selects, as in a table of positions."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable
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

MOST_KEPT, LARGEST_KEPT = 16, 2**17
"""Number of selections that are kept for later batches, and the largest number of their entries."""


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
        if self._selected == rows.shape[1]:  # each entry once
            return rows if self._selected == self.size else F.pad(rows, (1, 0))
        sums = rows.new_zeros(len(rows), self._selected + 1)
        sums.scatter_add_(1, self._columns.expand_as(rows), rows)
        sums[:, 0] = 0
        return sums[:, 1:] if self._selected == self.size else sums

    @functools.cached_property
    def _is_selected(self) -> Tensor:
        """For zero and each entry of the parameter whether it is selected."""
        is_selected = torch.bincount(self.entries, minlength=self.size + 1) > 0
        is_selected[0] = True  # the column of all entries without a gradient
        return is_selected

    @functools.cached_property
    def _selected(self) -> int:
        """The number of entries of the parameter that are selected."""
        return int(self._is_selected.sum()) - 1

    @functools.cached_property
    def _columns(self) -> Tensor:
        """For each entry of the tensor its column in the result of :meth:`touched`."""
        columns = self._is_selected.cumsum(0) - 1
        return columns.index_select(0, self.entries)


@dataclass(frozen=True)
class _Origin:
    """Everything that the entries of a derived tensor depend on, beside the values of the parameter.

    Args:
        settings: The names of the nodes of its graph, the numbers that they saved, and shapes.
        tensors: The tensors that they saved, such as indices.
    """

    settings: Hashable
    tensors: tuple[Tensor, ...]

    @staticmethod
    def of(derived: Tensor, parameter: Tensor) -> _Origin:
        """Return the origin of a tensor whose graph is a chain of nodes."""
        settings: list[Any] = [tuple(parameter.shape), tuple(derived.shape)]
        tensors: list[Tensor] = []
        node: Any = derived.grad_fn
        while getattr(node, "variable", None) is None:
            settings.append(node.name())
            kind: Any = type(node)
            for name in _saved_names(kind):
                saved = getattr(node, name)
                settings.append(name)
                for value in saved if isinstance(saved, (tuple, list)) else [saved]:
                    if isinstance(value, Tensor):
                        settings.append((value.dtype, tuple(value.shape)))
                        tensors.append(value)
                    else:
                        settings.append(value)
            (node,) = [function for function, _ in node.next_functions if function is not None]
        return _Origin(tuple(settings), tuple(tensors))

    def kept(self) -> _Origin:
        """Return the same with copies of the tensors."""
        return _Origin(self.settings, tuple(map(torch.clone, self.tensors)))

    def equals(self, other: _Origin) -> bool:
        """Return whether the values of the tensors are equal too."""
        return self.settings == other.settings and all(map(torch.equal, self.tensors, other.tensors))


@functools.cache
def _saved_names(kind: type) -> tuple[str, ...]:
    """Return the attributes with what a node of an autograd graph saved."""
    return tuple(name for name in dir(kind) if name.startswith("_saved_"))


_kept: dict[Hashable, tuple[_Origin, Selection]] = {}
"""Selections by the settings of their origins."""


def selection_of(derived: Tensor, parameter: Tensor) -> Selection | None:
    """Return the entries of a parameter that a tensor consists of; ``None`` if they are not known without waiting for a device.

    Args:
        derived: A tensor with a graph.
        parameter: The leaf of that graph.
    """
    is_exact = parameter.dtype == derived.dtype in (torch.float32, torch.float64) and parameter.numel() < LARGEST
    if not is_exact or reads_are_slow(derived) or _leaf(derived, CHOICES) is not parameter:
        return None
    origin = _Origin.of(derived, parameter)  # its values are compared: their versions do not show all changes
    before = _kept.get(origin.settings)
    if before is not None and before[0].equals(origin):
        return before[1]
    selection = _computed(derived, parameter)
    has_values = any(tensor.is_floating_point() for tensor in origin.tensors)  # of the parameter, which change
    if len(selection.entries) <= LARGEST_KEPT and not has_values:
        if len(_kept) >= MOST_KEPT:
            _kept.clear()
        _kept[origin.settings] = origin.kept(), selection
    return selection


def _computed(derived: Tensor, parameter: Tensor) -> Selection:
    """Return the entries, from the derivative of the tensor."""
    with torch.enable_grad():
        outer = torch.zeros_like(derived, requires_grad=True)
        (pulled,) = torch.autograd.grad(derived, parameter, outer, create_graph=True)
        numbers = torch.arange(1, parameter.numel() + 1, dtype=parameter.dtype).view_as(parameter)
        # The gradient is linear in the outer gradient, so this is the tensor that is derived from the numbers.
        (entries,) = torch.autograd.grad(pulled, outer, numbers)
    return Selection(entries.long().flatten(), parameter.numel())
