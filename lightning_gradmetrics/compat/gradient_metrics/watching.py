"""Watching the forward passes of a user's modules, to collect from their graphs later."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge

from lightning_gradmetrics.compat.gradient_metrics.listener import Listener, listen
from lightning_gradmetrics.compat.gradient_metrics.ownership import (
    Graph,
    LossWeights,
    ModuleOutput,
    OwnershipError,
    mark_outputs,
    owners,
    resolution,
)
from lightning_gradmetrics.compat.gradient_metrics.planning import ModulePlan, plan_module, samples_in
from lightning_gradmetrics.compat.gradient_metrics.verification import DisagreementError, Record, Verification
from lightning_gradmetrics.engine.calls import OpeningMode, tensors_in
from lightning_gradmetrics.engine.model_state import attribute_key
from lightning_gradmetrics.engine.plan import PlanError
from lightning_gradmetrics.engine.uses import Use, combined

__all__ = ["Watch"]

Sink = Callable[[int, Use, Tensor], None]
"""Gets a parameter's identity, its use, and the loss that each sample of the use belongs to, -1 for none."""

UNSEEN = "the forward pass was not watched; build the collector with layers, before the forward pass"
UNSEEN_PARAMETER = "a target is not a parameter of a layer whose forward pass was watched"

_watches: WeakSet[Watch] = WeakSet()
_listeners: WeakSet[Listener] = WeakSet()
_plans: WeakKeyDictionary[nn.Module, dict[Any, ModulePlan]] = WeakKeyDictionary()
_numbers: WeakKeyDictionary[Listener, int] = WeakKeyDictionary()
_count = itertools.count()
_plan_of: WeakKeyDictionary[Listener, ModulePlan] = WeakKeyDictionary()


@dataclass
class _Watched:
    """The forward pass that is being listened to."""

    watch: Watch
    module: nn.Module
    listener: Listener
    plan: ModulePlan
    depth: int = 1


class _Current(threading.local):
    watched: _Watched | None = None
    planning = False


_current = _Current()


class Watch:
    """Hooks on modules that let a :class:`Listener` into each forward pass; nothing else is kept of one.

    All watches share their listeners: a forward pass is heard once for all parameters that any of them wants.

    Args:
        modules: The modules to watch. A module inside the forward pass of another one belongs to that one.
        parameters: The parameters to collect for, by identity.
    """

    def __init__(self, modules: Sequence[nn.Module], parameters: Mapping[int, Tensor]) -> None:
        self._parameters = dict(parameters)
        self._why_unseen = ""
        self._told: set[str] = set()
        self._handles: list[Any] = []
        inside = {id(part) for module in modules for part in module.modules() if part is not module}
        for module in dict.fromkeys(modules):
            if id(module) not in inside:
                self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._after, with_kwargs=True, always_call=True))
        _watches.add(self)

    def __reduce__(self) -> Any:
        """A copy of a watched module is not watched."""
        return Watch, ((), {})

    def remove(self) -> None:
        """Take the hooks off the modules."""
        _watches.discard(self)
        for handle in self._handles:
            handle.remove()

    # -- forward ------------------------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        current = _current.watched
        if current is not None:
            current.depth += current.watch is self and current.module is module
            return
        size = samples_in((args, kwargs))
        if not size or not _can_listen():
            return
        parameters = _wanted_parameters(module)
        if not parameters:
            return
        plan = _plan(module, args, kwargs, parameters)
        if plan.plan is None:
            self._why_unseen = plan.reason
            return
        listener = Listener(plan.plan, parameters, size)
        _current.watched = _Watched(self, module, listener, plan)
        listener.__enter__()

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        current = _current.watched
        if current is None or current.watch is not self or current.module is not module:
            return
        current.depth -= 1
        if current.depth:
            return
        _current.watched = None
        listener, plan = current.listener, current.plan
        listener.__exit__(None, None, None)
        if listener.broken:
            self._why_unseen = listener.broken
            _forget(module, plan)
            return
        outputs = list(tensors_in(output))
        if len(outputs) == len(plan.outputs):
            mark_outputs(outputs, plan.outputs, listener)
            _listeners.add(listener)
            _plan_of[listener], _numbers[listener] = plan, next(_count)

    def tell(self, reason: str) -> None:
        """Warn, once per reason, that the slow way is taken."""
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(
                f"gradient metrics take one backward pass per loss here, which is slow: {reason}. The values are the same",
                stacklevel=4,
            )

    # -- backward -----------------------------------------------------------------------------------------------------

    def collect(self, loss: Tensor, sink: Sink, retain_graph: bool) -> str:
        """Collect every reached parameter's use from one backward pass.

        Args:
            loss: Losses ``(M,)``.
            sink: Gets each parameter's use.
            retain_graph: Whether to keep the graph.

        Returns:
            Why nothing was collected; an empty text if something was.

        Raises:
            PlanError: If what was collected cannot be right. The graph is kept.
        """
        graph = Graph(loss)
        listeners = self._reached(graph)
        covered = {id(p) for listener in listeners for p in listener.parameters.values()}
        if not listeners:
            return self._why_unseen or UNSEEN
        if {key for key in self._parameters if key in graph.leaves} - covered:
            return UNSEEN_PARAMETER
        plans = [_plan_of[listener] for listener in listeners]
        kind = sum(graph.leaves.get(key, 0) for key in self._parameters)
        record = plans[0].records.setdefault((kind, *map(_Identity, plans)), Record())
        live = {key: p for key, p in self._parameters.items() if p.requires_grad and key in graph.leaves}
        unverified = {key: live[key] for key in record.open(live) if key in live}
        try:
            base, numbers, references = _owners(graph, listeners, unverified)
            groups = _groups(listeners, numbers)
        except OwnershipError as error:
            return str(error)
        check = Verification(references, base, any(p.autocast for p in plans), record) if unverified else None
        try:
            self._listen(loss, groups, sink, check, retain_graph or check is not None)
        except PlanError as error:
            if check is None and not retain_graph:
                raise RuntimeError(
                    f"the graph was changed after the forward pass ({error}); call the collector with retain_graph=True"
                ) from error
            if isinstance(error, DisagreementError):
                for plan in plans:
                    plan.plan, plan.reason = None, str(error)
            raise
        return ""

    def _reached(self, graph: Graph) -> list[Listener]:
        """The listeners that the losses come from and that heard one of the parameters."""
        listeners = []
        for listener in list(_listeners):
            own = any(id(p) in self._parameters for p in listener.parameters.values())
            if own and id(listener.anchor) in graph.leaves:
                listeners.append(listener)
        return sorted(listeners, key=_numbers.__getitem__)

    def _listen(
        self, loss: Tensor, groups: Sequence[_Group], sink: Sink, check: Verification | None, retain_graph: bool
    ) -> None:
        """Collect from all listeners; uses of one parameter in forward passes of the same samples are joined."""
        gathered: dict[tuple[int, int], list[Use]] = {}
        listeners: list[Listener] = []
        sinks = []

        def finish(key: int, use: Use, numbers: Tensor) -> None:
            if check is not None:
                check(key, use, numbers)
            sink(key, use, numbers)

        def receiver(listener: Listener, position: int, group: _Group) -> Callable[[str, Use], None]:
            def receive(name: str, use: Use) -> None:
                key = id(listener.parameters[name])
                if key not in self._parameters:
                    return
                if len(group.listeners) == 1:
                    finish(key, use, group.numbers)
                else:
                    gathered.setdefault((position, key), []).append(use)

            return receive

        for position, group in enumerate(groups):
            for listener in group.listeners:
                listeners.append(listener)
                sinks.append(receiver(listener, position, group))
        listen(loss, listeners, sinks, retain_graph)
        for (position, key), uses in gathered.items():
            finish(key, combined(uses), groups[position].numbers)
        if check is not None:
            check.finish()


@dataclass(frozen=True)
class _Identity:
    """An object as a part of a key: it stays alive with the key."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


@dataclass
class _Group:
    """Listeners whose samples belong to the same losses.

    Args:
        numbers: The loss of each sample, ``(N,)``.
        listeners: The listeners.
    """

    numbers: Tensor
    listeners: list[Listener]


def _groups(listeners: Sequence[Listener], numbers: Sequence[Tensor]) -> list[_Group]:
    """The listeners by the losses of their samples.

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
    own = {id(p) for p in other.parameters.values()}
    return any(id(p) in own for listener in listeners for p in listener.parameters.values())


def _owners(
    graph: Graph, listeners: Sequence[Listener], parameters: Mapping[int, Tensor]
) -> tuple[Tensor, list[Tensor], dict[int, Tensor]]:
    """The weights of the losses, each listener's owners, and the weighted sum's gradients of some parameters."""
    loss, outputs = graph.loss, []
    for listener in listeners:
        graph.check_reached(listener)
        outputs.append(graph.edges.get(listener, {}))
    edges = list({edge: None for own in outputs for edge in own})
    dtypes = {loss.dtype, *(output.dtype for own in outputs for output in own.values())}
    precise = resolution(list(dtypes))
    weights = LossWeights.for_losses(loss, precise.levels)
    first = _gradients(loss, edges, weights.base, list(parameters.values()))
    others = []
    for number in range(len(weights.exponents)):
        others.append(dict(zip(edges, _gradients(loss, edges, weights.weights(number)), strict=True)))
    at_edges = dict(zip(edges, first, strict=False))
    numbers = []
    for listener, own in zip(listeners, outputs, strict=True):
        numbers.append(_owners_of(listener, own, at_edges, others, weights, precise.tolerance))
    references = dict(zip(parameters, first[len(edges) :], strict=True))
    return weights.base, numbers, {key: g for key, g in references.items() if g is not None}


def _owners_of(
    listener: Listener,
    own: Mapping[GradientEdge, ModuleOutput],
    first: Mapping[GradientEdge, Tensor | None],
    others: Sequence[Mapping[GradientEdge, Tensor | None]],
    weights: LossWeights,
    tolerance: float,
) -> Tensor:
    axes = [output.axis for output in own.values()]
    rest = [[gradients[edge] for edge in own] for gradients in others]
    return owners([first[edge] for edge in own], rest, axes, weights, listener.size, tolerance)


def _gradients(
    loss: Tensor, edges: Sequence[GradientEdge], weights: Tensor, parameters: Sequence[Tensor] = ()
) -> list[Tensor | None]:
    """Gradients of a weighted sum of the losses, the graph kept."""
    inputs: list[Any] = [*edges, *parameters]
    try:
        return list(torch.autograd.grad([loss], inputs, [weights], retain_graph=True, allow_unused=True))
    except RuntimeError as error:
        raise OwnershipError(f"torch refuses a second backward pass: {error}") from error


def _can_listen() -> bool:
    """Whether this is a plain forward pass with gradients."""
    if _current.planning or OpeningMode.active or torch.compiler.is_compiling():
        return False
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    transformed = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    return not transformed and torch._C._len_torch_dispatch_stack() == 0


def _wanted_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's parameters that any watch wants."""
    wanted: set[int] = set()
    for watch in list(_watches):
        wanted |= watch._parameters.keys()
    return {name: p for name, p in module.named_parameters() if id(p) in wanted}


def _plan(module: nn.Module, args: Any, kwargs: Any, parameters: Mapping[str, nn.Parameter]) -> ModulePlan:
    """The plan for a call."""
    known = _plans.setdefault(module, {})
    key = _key(module, args, kwargs, parameters)
    if key in known:
        return known[key]
    _current.planning = True
    try:
        plan = plan_module(module, args, kwargs, parameters)
    except Exception as error:  # whatever a trial run meets must not disturb the user's forward pass
        return ModulePlan(None, reason=f"{type(error).__name__}: {error}")
    finally:
        _current.planning = False
    tensors = tensors_in((args, kwargs))
    plan.autocast = any(torch.is_autocast_enabled(tensor.device.type) for tensor in tensors)
    # The trial runs may have shown that an attribute changes in every forward pass: it is no part of the key any more.
    known[_key(module, args, kwargs, parameters)] = plan
    return plan


def _key(module: nn.Module, args: Any, kwargs: Any, parameters: Mapping[str, nn.Parameter]) -> Hashable:
    """What a plan depends on."""
    tensors = list(tensors_in((args, kwargs)))
    return (
        tuple((tensor.shape[1:], tensor.dtype, tensor.device) for tensor in tensors),
        tuple(parameters),
        tuple((id(part), part.training) for part in module.modules()),
        attribute_key(module),
        tuple(torch.is_autocast_enabled(tensor.device.type) for tensor in tensors),
    )


def _forget(module: nn.Module, plan: ModulePlan) -> None:
    """Plan anew at the next call: this one did not follow the plan."""
    known = _plans.get(module, {})
    for key in [key for key, other in known.items() if other is plan]:
        del known[key]
