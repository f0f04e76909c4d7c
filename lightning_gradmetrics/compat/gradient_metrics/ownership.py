"""Finds the sample and the forward pass of each loss from the graph and from backward passes to the outputs."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_gradmetrics.compat.gradient_metrics.listener import Listener
from lightning_gradmetrics.engine.tracing.axes import Axis

__all__ = ["Graph", "LossWeights", "OwnershipError", "mark_outputs", "owners", "resolution"]

MARK = "lightning_gradmetrics outputs"
"""The key in a graph node's metadata for the outputs of watched modules."""

WIDEST = 1024
"""Largest number of entries of a sample's output gradient that are compared individually."""


class OwnershipError(Exception):
    """Not every loss belongs to exactly one sample."""


@dataclass(frozen=True)
class ModuleOutput:
    """A tensor that a watched module returned: an output of a graph node."""

    listener: weakref.ref[Listener]
    index: int
    axis: Axis | None
    dtype: torch.dtype


def mark_outputs(tensors: Sequence[Tensor], axes: Sequence[Axis | None], listener: Listener) -> None:
    """Mark the outputs of a listener's module in the graph."""
    for tensor, axis in zip(tensors, axes, strict=True):
        if tensor.grad_fn is not None:
            entry = ModuleOutput(weakref.ref(listener), tensor.output_nr, axis, tensor.dtype)
            _metadata(tensor.grad_fn).setdefault(MARK, []).append(entry)


def _metadata(node: Node) -> dict[Any, Any]:
    """Return the Python metadata of a graph node, which lives as long as the node."""
    return node.metadata  # type: ignore[return-value]


def _outputs_at(node: Node, index: int) -> list[ModuleOutput]:
    return [entry for entry in _metadata(node).get(MARK, ()) if entry.index == index]


@dataclass
class Graph:
    """The graph of some losses.

    Args:
        loss: The losses, ``(M,)``.
        leaves: For each leaf tensor, by identity, the number of times it enters the graph.
        passed: For each leaf, the listeners whose outputs are on all paths to it.
        edges: For each listener, the edges at which the outputs of its module enter the graph, with their descriptions.
    """

    loss: Tensor
    leaves: Counter[int] = field(default_factory=Counter)
    passed: dict[int, frozenset[Listener]] = field(default_factory=dict)
    edges: dict[Listener, dict[GradientEdge, ModuleOutput]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        root = self.loss.grad_fn
        assert root is not None
        passed: dict[Node, frozenset[Listener]] = {root: self._outputs(root, self.loss.output_nr)}
        for node in _from_loss_to_leaves(root):
            for child, index in node.next_functions:
                if child is None:
                    continue
                here = passed[node] | self._outputs(child, index)
                passed[child] = passed[child] & here if child in passed else here
                if hasattr(child, "variable"):
                    self.leaves[id(child.variable)] += 1
                    self.passed[id(child.variable)] = passed[child]

    def _outputs(self, node: Node, index: int) -> frozenset[Listener]:
        """Return the listeners whose module returned this output of the node."""
        listeners = []
        for entry in _outputs_at(node, index):
            listener = entry.listener()
            if listener is None:
                continue
            listeners.append(listener)
            edge = GradientEdge(node, index)
            self.edges.setdefault(listener, {})[edge] = entry
        return frozenset(listeners)

    def check_reached(self, listener: Listener) -> None:
        """Check that the losses depend on a forward pass only through its outputs.

        Raises:
            OwnershipError: If the losses use anything else of it.
        """
        if listener not in self.passed[id(listener.anchor)]:
            raise OwnershipError("the losses use more of the watched module than its outputs")


def _from_loss_to_leaves(root: Node) -> list[Node]:
    """Return all nodes ordered so that each comes before the nodes that it depends on."""
    order: list[Node] = []
    visited: set[Node] = {root}
    waiting: list[tuple[Node, Any]] = [(root, iter(root.next_functions))]
    while waiting:
        node, children = waiting[-1]
        for child, _ in children:
            if child is not None and child not in visited:
                visited.add(child)
                waiting.append((child, iter(child.next_functions)))
                break
        else:
            order.append(node)
            waiting.pop()
    return order[::-1]


@dataclass(frozen=True)
class LossWeights:
    """Weights that identify the losses in backward passes.

    The first pass multiplies each loss by a random number between 1 and 2; the other passes also multiply it by powers
    of two. Scaling by powers of two is exact, so the powers can be read from the gradients.

    Args:
        base: The weights ``(M,)`` of the first pass.
        exponents: The powers of two of the other passes, ``(passes, M)``, different for every loss.
    """

    base: Tensor
    exponents: Tensor

    @classmethod
    def for_losses(cls, loss: Tensor, levels: int) -> LossWeights:
        """Return weights for losses ``(M,)`` with ``levels`` different powers of two."""
        count = len(loss)
        passes = 1
        while levels**passes < count:
            passes += 1
        codes = torch.randperm(levels**passes if passes == 1 else count, generator=_GENERATOR)[:count]
        digits = []
        for _ in range(passes):
            digits.append(codes % levels - levels // 2)
            codes = codes // levels
        base = 1 + torch.rand(count, generator=_GENERATOR)
        return cls(base.to(loss.device, loss.dtype), torch.stack(digits))

    def weights(self, number: int) -> Tensor:
        """Return the weights of one of the passes after the first, ``(M,)``."""
        return torch.ldexp(self.base, self.exponents[number].to(self.base.device)).to(self.base.dtype)


_GENERATOR = torch.Generator().manual_seed(0)


@dataclass(frozen=True)
class Resolution:
    """The precision of scaling by powers of two for a floating type, and the number of usable powers."""

    tolerance: float
    levels: int


def resolution(dtypes: Sequence[torch.dtype]) -> Resolution:
    """Return the coarsest resolution among floating types."""
    if torch.float16 in dtypes:
        return Resolution(1e-3, 9)
    if any(dtype != torch.float64 for dtype in dtypes):
        return Resolution(1e-5, 17)
    return Resolution(1e-9, 29)


def owners(
    first: Sequence[Tensor | None],
    others: Sequence[Sequence[Tensor | None]],
    axes: Sequence[Axis | None],
    weights: LossWeights,
    size: int,
    tolerance: float,
) -> Tensor:
    """Return the loss of each sample of a forward pass, ``(N,)``; -1 for samples without a gradient.

    Args:
        first: The gradients of the first weighted sum of the losses for each output, or ``None``.
        others: The gradients of the other weighted sums.
        axes: The sample axis of each output.
        weights: The weights of the losses.
        size: The number of samples ``N``.
        tolerance: The largest relative error of a power of two.

    Raises:
        OwnershipError: If a sample belongs to several losses, or a loss to several samples.
    """
    signs: dict[int, Tensor] = {}
    left = _rows(first, axes, size, signs)
    if left is None:
        return torch.full((size,), -1)
    finite, exponents = left.isfinite().all(1), []
    for gradients in others:
        right = _rows(gradients, axes, size, signs)
        assert right is not None
        ratio = (left * right).sum(1) / (left * left).sum(1)
        exponent = ratio.clamp(min=2.0**-64).log2().round()
        error = (right - torch.exp2(exponent)[:, None] * left).norm(dim=1)
        if bool((finite & (error > tolerance * right.norm(dim=1))).any()):
            raise OwnershipError("a sample belongs to several losses, or a loss depends on several samples")
        exponents.append(exponent.nan_to_num(0))
    return _checked(_looked_up(torch.stack(exponents), weights), left, finite, len(weights.base))


def _looked_up(exponents: Tensor, weights: LossWeights) -> Tensor:
    """Return the loss that has the exponents of each sample ``(passes, N)``; -2 if there is none."""
    codes = {}
    for number, code in enumerate(weights.exponents.T.tolist()):
        codes[tuple(code)] = number
    numbers = []
    for code in exponents.T.long().tolist():
        numbers.append(codes.get(tuple(code), -2))
    return torch.tensor(numbers, dtype=torch.long)


def _checked(numbers: Tensor, left: Tensor, finite: Tensor, count: int) -> Tensor:
    """Return the losses of the samples, resolving samples whose gradient is missing or not finite.

    If there are as many losses as samples, such a sample is assigned to the loss with the same number.
    """
    size = len(numbers)
    numbers = torch.where(finite & ~left.any(1), -1, numbers)
    if not bool(finite.all()):
        others = numbers[finite]
        in_order = bool(((others == torch.arange(size)[finite]) | (others == -1)).all())
        if count != size or not in_order:
            raise OwnershipError("some gradients are not finite")
        numbers = torch.where(finite, numbers, torch.arange(size))
    taken = numbers[numbers != -1]
    if bool((taken == -2).any()):
        raise OwnershipError("a sample belongs to several losses")
    if len(set(taken.tolist())) != len(taken):
        raise OwnershipError("a loss depends on several samples")
    return numbers


def _rows(
    gradients: Sequence[Tensor | None], axes: Sequence[Axis | None], size: int, signs: dict[int, Tensor]
) -> Tensor | None:
    """Return the gradients of all outputs, ``(N, entries)`` in float64 on the CPU; wide ones reduced by random signed sums."""
    rows = []
    for gradient, axis in zip(gradients, axes, strict=True):
        if gradient is None:
            continue
        if axis is None:
            if bool((gradient != 0).any()):
                raise OwnershipError("the losses use an output of the watched module that belongs to no sample")
            continue
        if axis.size(gradient) != size:
            raise OwnershipError("an output of the watched module has a different number of samples than its inputs")
        rows.append(_narrow(axis.split(gradient).reshape(size, -1), signs))
    return torch.cat(rows, 1) if rows else None


def _narrow(rows: Tensor, signs: dict[int, Tensor]) -> Tensor:
    """Return rows ``(N, D)`` in float64 on the CPU, with at most :data:`WIDEST` columns."""
    width = rows.shape[1]
    if width <= WIDEST:
        return rows.double().cpu()
    if width not in signs:
        signs[width] = torch.randint(2, (width,), generator=_GENERATOR).mul(2).sub(1)
    signed = F.pad(rows * signs[width].to(rows.device, rows.dtype), (0, -width % WIDEST))
    return signed.reshape(len(rows), WIDEST, -1).sum(2, dtype=torch.float64).cpu()
