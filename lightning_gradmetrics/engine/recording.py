"""Watching the forward passes of a user's modules, to collect from their graphs later."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.engine.agreement import agree
from lightning_gradmetrics.engine.calls import OpeningMode, tensors_in
from lightning_gradmetrics.engine.listener import Listener, plan_module, samples_in
from lightning_gradmetrics.engine.plan import Plan, PlanError
from lightning_gradmetrics.engine.reference import loss_gradients
from lightning_gradmetrics.engine.uses import Use, combined
from lightning_gradmetrics.gradients.statistics import gradient_moments

__all__ = ["Recording"]

Sink = Callable[[int, Use], None]


class Recording:
    """Hooks on modules that let a :class:`Listener` into each forward pass; nothing else is kept of one.

    Args:
        modules: The modules to watch; what runs inside another's forward pass belongs to that.
        parameters: The parameters to collect for, by identity.
    """

    def __init__(self, modules: Sequence[nn.Module], parameters: Mapping[int, Tensor]) -> None:
        self._parameters = dict(parameters)
        self._plans: dict[Any, Plan] = {}
        self._trusted: set[Any] = set()
        self._failure = ""
        self._listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
        self._current: tuple[nn.Module, Listener] | None = None
        self._problem = ""
        self._handles: list[Any] = []
        inside = {id(part) for module in modules for part in module.modules() if part is not module}
        for module in (m for m in dict.fromkeys(modules) if id(m) not in inside):
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after, with_kwargs=True, always_call=True))

    def __reduce__(self) -> Any:
        """A copy of a watched module is not watched."""
        return Recording, ((), {})

    def remove(self) -> None:
        """Take the hooks off the modules."""
        for handle in self._handles:
            handle.remove()

    # -- forward ------------------------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        size = samples_in((args, kwargs))
        busy = self._current is not None or OpeningMode.active or torch.compiler.is_compiling()
        if busy or not size or not torch.is_grad_enabled() or torch.is_inference_mode_enabled() or self._problem:
            return
        chosen = {name: p for name, p in module.named_parameters() if id(p) in self._parameters}
        plan = self._plan(module, args, kwargs, chosen) if chosen else None
        if plan is not None:
            listener = Listener(plan, chosen, size)
            self._current = (module, listener)
            listener.__enter__()

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        failure, self._failure = self._failure, ""
        if failure and output is not None:  # the probe failed, and not because the module itself does
            self.give_up(failure)
        if self._current is not None and self._current[0] is module:
            listener = self._current[1]
            self._current = None
            listener.__exit__(None, None, None)
            self._listeners.add(listener)

    def _plan(self, module: nn.Module, args: Any, kwargs: Any, chosen: Mapping[str, nn.Parameter]) -> Plan | None:
        shapes = tuple((t.shape[1:], t.dtype, t.device) for t in tensors_in((args, kwargs)))
        modes = tuple(m.training for m in module.modules())
        autocast = tuple(torch.is_autocast_enabled(t.device.type) for t in tensors_in((args, kwargs)))
        key = (id(module), shapes, modes, autocast)
        if key not in self._plans:
            if any(type(m).__name__ == "OptimizedModule" for m in module.modules()):
                self.give_up("a compiled module's calls cannot be seen")
                return None
            try:
                self._plans[key] = plan_module(module, args, kwargs, chosen)
            except Exception as error:  # whatever a probe runs into must not disturb the user's forward pass
                self._failure = f"{type(error).__name__}: {error}"
                return None
            if self._plans[key].uncovered:
                self.give_up(f"no fast rule for {', '.join(self._plans[key].uncovered)}")
                return None
        return self._plans[key]

    def give_up(self, reason: str) -> None:
        """Watch no more, and say once why."""
        if not self._problem:
            self._problem = reason
            warnings.warn(
                f"gradient metrics take one backward pass a sample here, which is slow: {reason}. "
                "The values are the same",
                stacklevel=4,
            )

    # -- backward -----------------------------------------------------------------------------------------------------

    def collect(self, loss: Tensor, sink: Sink, retain_graph: bool) -> bool:
        """Collect every reached parameter's use from one backward pass.

        Args:
            loss: Losses ``(N,)``.
            sink: Gets each parameter's identity and use.
            retain_graph: Whether to keep the graph.

        Returns:
            Whether the forward passes behind the losses were seen; if not, nothing was collected.

        Raises:
            PlanError: If what was collected cannot be right.
        """
        if self._problem or not len(loss):
            return False
        edges = _parameter_edges(loss)
        listeners = [listener for listener in self._listeners if id(listener.anchor) in edges]
        covered = {id(p) for listener in listeners for p in listener.parameters.values()}
        missing = {key for key in self._parameters if key in edges} - covered
        if missing or not listeners:
            self.give_up(_UNSEEN_PARAMETER if listeners else _UNSEEN)
            return False
        # What was right once is right again for the same plans and as many places where parameters enter the graph.
        kind = (
            *sorted(id(listener.plan) for listener in listeners),
            sum(edges.get(key, 0) for key in self._parameters),
        )
        check = None if kind in self._trusted else _Check(loss, self._parameters)
        uses = _Uses(listeners, sink if len(listeners) == 1 and check is None else None)
        for number, listener in enumerate(listeners):
            keep = retain_graph or check is not None or number < len(listeners) - 1
            listener.listen(loss, partial(uses.add, listener), keep)
        for key, use in uses.joined():
            if check is not None:
                check(key, use)
            sink(key, use)
        if check is not None:
            check.missing(uses.found)
        self._trusted.add(kind)
        return True


_UNSEEN = "the forward pass was not watched; build the collector with layers, before the forward pass"
_UNSEEN_PARAMETER = "a target is not a parameter of a layer whose forward pass was watched"


def _parameter_edges(loss: Tensor) -> Counter[int]:
    """For each leaf tensor that the loss depends on, by identity, in how many places it enters the graph."""
    edges: Counter[int] = Counter()
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        for node, _ in waiting.pop().next_functions:  # type: ignore[union-attr]
            if node is None:
                continue
            if hasattr(node, "variable"):
                edges[id(node.variable)] += 1
            elif node not in seen:
                seen.add(node)
                waiting.append(node)
    return edges


class _Uses:
    """What comes from several listeners: handed on at once if there is one only, otherwise joined at the end."""

    def __init__(self, listeners: Sequence[Listener], sink: Sink | None) -> None:
        self._names = {id(x): {name: id(p) for name, p in x.parameters.items()} for x in listeners}
        self._sink = sink
        self._uses: dict[int, list[Use]] = {}

    def add(self, listener: Listener, name: str, use: Use) -> None:
        """Take a parameter's use."""
        key = self._names[id(listener)][name]
        if self._sink is not None:
            self._sink(key, use)
        else:
            self._uses.setdefault(key, []).append(use)

    @property
    def found(self) -> set[int]:
        """The parameters that have uses."""
        return set(self._uses)

    def joined(self) -> Iterator[tuple[int, Use]]:
        """What was not handed on yet."""
        for key, several in self._uses.items():
            yield key, combined(several)


class _Check:
    """Compares what was collected for one sample with autograd."""

    def __init__(self, loss: Tensor, parameters: Mapping[int, Tensor]) -> None:
        self._sample = int(
            torch.where(loss.detach().isfinite(), loss.detach(), loss.detach().new_tensor(-1e30)).argmax()
        )
        live = {key: p for key, p in parameters.items() if p.requires_grad}
        gradients = loss_gradients(loss[self._sample], list(live.values())) if live else []
        self._gradients = dict(zip(live, gradients, strict=True))
        self._scale = 1e-2 * max((float(g.double().norm()) for g in gradients), default=0.0)

    def __call__(self, key: int, use: Use) -> None:
        if key in self._gradients:
            keys = frozenset(["sum", "max", "min", 1.0, 2.0])
            one = use.rows(self._sample, self._sample + 1)
            moments = gradient_moments(one.gradient(), keys)  # type: ignore[arg-type]
            if not agree(moments, self._gradients[key][None], self._scale):
                raise PlanError("the fast way disagrees with autograd on a sample")

    def missing(self, found: set[int]) -> None:
        """Check that what was not collected has no gradient."""
        if any(bool(g.any()) for key, g in self._gradients.items() if key not in found):
            raise PlanError("the fast way misses a gradient that autograd finds")
