"""Collects the gradients of all samples from the graph of the losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_gradmetrics.compat.gradient_metrics.listener import HEARD, Listener, listen
from lightning_gradmetrics.compat.gradient_metrics.ownership import (
    Graph,
    LossWeights,
    ModuleOutput,
    OwnershipError,
    owners,
    resolution,
)
from lightning_gradmetrics.compat.gradient_metrics.verification import Record, Verification
from lightning_gradmetrics.engine.passes.plan import DisagreementError, PlanError
from lightning_gradmetrics.engine.uses import Use, combined

__all__ = ["collect"]

Sink = Callable[[int, Use, Tensor], None]
"""A function that receives a parameter's identity, its use, and the loss of each sample of the use (-1 for none)."""

UNSEEN = "the forward pass was not watched; build the collector with layers, before the forward pass"
UNSEEN_PARAMETER = "a target is not a parameter of a layer whose forward pass was watched"


def collect(
    loss: Tensor, parameters: Mapping[int, Tensor], sink: Sink, retain_graph: bool, why_unseen: str = ""
) -> str:
    """Collect the uses of all parameters that the losses depend on, in one backward pass.

    Args:
        loss: Losses ``(M,)``.
        parameters: The parameters to collect for, by identity.
        sink: Receives each parameter's use.
        retain_graph: Whether to keep the graph.
        why_unseen: Why the last forward pass was not recorded, if known.

    Returns:
        The reason why nothing was collected, or an empty string.

    Raises:
        PlanError: If the collected gradients are wrong. The graph is kept.
    """
    graph = Graph(loss)
    listeners = _reached(graph, parameters)
    reached = parameters.keys() & graph.leaves.keys()
    if not listeners:
        return why_unseen or UNSEEN
    if reached - _heard(listeners):
        return UNSEEN_PARAMETER
    record = _record(listeners, sum(map(graph.leaves.__getitem__, reached)))
    trainable = {key: parameters[key] for key in parameters if key in reached and parameters[key].requires_grad}
    unverified = _chosen(trainable, record.open(trainable))
    try:
        base, numbers, references = _owners(graph, listeners, unverified)
        groups = _groups(listeners, numbers)
    except OwnershipError as error:
        return str(error)
    autocast = any(listener.module_plan.autocast for listener in listeners)
    check = Verification(references, base, autocast, record) if unverified else None
    try:
        _Collection(parameters, groups, sink, check).run(loss, retain_graph or check is not None)
    except DisagreementError as error:
        for listener in listeners:
            listener.module_plan.plan, listener.module_plan.reason = None, str(error)
        raise
    except PlanError as error:
        if check is not None or retain_graph:
            raise
        raise RuntimeError(
            f"the graph was changed after the forward pass ({error}); call the collector with retain_graph=True"
        ) from error
    return ""


def _chosen(parameters: Mapping[int, Tensor], keys: Set[int]) -> dict[int, Tensor]:
    """Return the parameters with some of the keys, in the order of the keys."""
    chosen = {}
    for key in keys:
        if key in parameters:
            chosen[key] = parameters[key]
    return chosen


def _heard(listeners: Sequence[Listener]) -> set[int]:
    """Return the parameters that the listeners recorded, by identity."""
    heard: set[int] = set()
    for listener in listeners:
        heard |= _identities(listener)
    return heard


def _identities(listener: Listener) -> set[int]:
    return set(map(id, listener.parameters.values()))


def _record(listeners: Sequence[Listener], entries: int) -> Record:
    """Return the record of comparisons for forward passes that occur together; parameters enter the graph ``entries`` times."""
    key: tuple[Any, ...] = (entries,)
    for listener in listeners:
        key += (_Identity(listener.module_plan),)
    return listeners[0].module_plan.records.setdefault(key, Record())


def _reached(graph: Graph, parameters: Mapping[int, Tensor]) -> list[Listener]:
    """Return, in order, the listeners that the losses come from and that recorded one of the parameters."""
    listeners = []
    for listener in list(HEARD):
        if _identities(listener) & parameters.keys() and id(listener.anchor) in graph.leaves:
            listeners.append(listener)
    return sorted(listeners, key=lambda listener: listener.number)


class _Collection:
    """Collects from all listeners, and joins uses of one parameter in several forward passes of the same samples."""

    def __init__(
        self, parameters: Mapping[int, Tensor], groups: Sequence[_Group], sink: Sink, check: Verification | None
    ) -> None:
        self._parameters, self._groups, self._sink, self._check = parameters, groups, sink, check
        self._waiting: dict[tuple[int, int], list[Use]] = {}

    def run(self, loss: Tensor, retain_graph: bool) -> None:
        """Run the backward pass.

        Raises:
            PlanError: If the collected gradients are wrong.
        """
        listeners: list[Listener] = []
        sinks = []
        for number, group in enumerate(self._groups):
            for listener in group.listeners:
                listeners.append(listener)
                sinks.append(partial(self._receive, listener, number))
        listen(loss, listeners, sinks, retain_graph)
        for (number, key), uses in self._waiting.items():
            self._finish(key, combined(uses), self._groups[number].numbers)
        if self._check is not None:
            self._check.finish()

    def _receive(self, listener: Listener, number: int, name: str, use: Use) -> None:
        key, group = id(listener.parameters[name]), self._groups[number]
        if key not in self._parameters:
            return
        if len(group.listeners) == 1:
            self._finish(key, use, group.numbers)
        else:
            self._waiting.setdefault((number, key), []).append(use)

    def _finish(self, key: int, use: Use, numbers: Tensor) -> None:
        if self._check is not None:
            self._check(key, use, numbers)
        self._sink(key, use, numbers)


@dataclass(frozen=True)
class _Identity:
    """Wraps an object for use in a key: it is compared by identity, and the key keeps it alive."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


@dataclass
class _Group:
    """Listeners of forward passes whose samples belong to the same losses.

    Args:
        numbers: The loss of each sample, ``(N,)``.
        listeners: The listeners.
    """

    numbers: Tensor
    listeners: list[Listener]


def _groups(listeners: Sequence[Listener], numbers: Sequence[Tensor]) -> list[_Group]:
    """Group the listeners by the losses of their samples.

    Raises:
        OwnershipError: If the samples of two groups share some losses, and some parameters.
    """
    groups: list[_Group] = []
    for listener, own in zip(listeners, numbers, strict=True):
        for group in groups:
            if torch.equal(group.numbers, own):
                group.listeners.append(listener)
                break
            if _share_losses(group.numbers, own) and _share_parameters(group.listeners, listener):
                raise OwnershipError("forward passes of different samples contribute to the same losses")
        else:
            groups.append(_Group(own, [listener]))
    return groups


def _share_losses(one: Tensor, other: Tensor) -> bool:
    return bool(torch.isin(one[one >= 0], other[other >= 0]).any())


def _share_parameters(listeners: Sequence[Listener], other: Listener) -> bool:
    return bool(_heard(listeners) & _identities(other))


def _owners(
    graph: Graph, listeners: Sequence[Listener], parameters: Mapping[int, Tensor]
) -> tuple[Tensor, list[Tensor], dict[int, Tensor]]:
    """Return the weights of the losses, each listener's owners, and the weighted sum's gradients of some parameters."""
    loss, outputs = graph.loss, []
    for listener in listeners:
        graph.check_reached(listener)
        outputs.append(graph.edges.get(listener, {}))
    merged: dict[GradientEdge, ModuleOutput] = {}
    for own in outputs:
        merged |= own
    edges = list(merged)
    precise = resolution([loss.dtype, *(output.dtype for output in merged.values())])
    weights = LossWeights.for_losses(loss, precise.levels)
    first = _gradients(loss, edges, weights.base, list(parameters.values()))
    others = []
    for number in range(len(weights.exponents)):
        others.append(dict(zip(edges, _gradients(loss, edges, weights.weights(number)), strict=True)))
    at_edges = dict(zip(edges, first, strict=False))
    numbers = []
    for listener, own in zip(listeners, outputs, strict=True):
        numbers.append(_owners_of(listener, own, at_edges, others, weights, precise.tolerance))
    references = {}
    for key, gradient in zip(parameters, first[len(edges) :], strict=True):
        if gradient is not None:
            references[key] = gradient
    return weights.base, numbers, references


def _owners_of(
    listener: Listener,
    own: Mapping[GradientEdge, ModuleOutput],
    first: Mapping[GradientEdge, Tensor | None],
    others: Sequence[Mapping[GradientEdge, Tensor | None]],
    weights: LossWeights,
    tolerance: float,
) -> Tensor:
    axes = [output.axis for output in own.values()]
    rest = []
    for gradients in others:
        rest.append(_picked(gradients, own))
    return owners(_picked(first, own), rest, axes, weights, listener.size, tolerance)


def _picked(gradients: Mapping[GradientEdge, Tensor | None], edges: Iterable[GradientEdge]) -> list[Tensor | None]:
    return [gradients[edge] for edge in edges]


def _gradients(
    loss: Tensor, edges: Sequence[GradientEdge], weights: Tensor, parameters: Sequence[Tensor] = ()
) -> list[Tensor | None]:
    """Return gradients of a weighted sum of the losses; the graph is kept."""
    inputs: list[Any] = [*edges, *parameters]
    try:
        return list(torch.autograd.grad([loss], inputs, [weights], retain_graph=True, allow_unused=True))
    except RuntimeError as error:
        raise OwnershipError(f"torch refuses a second backward pass: {error}") from error
