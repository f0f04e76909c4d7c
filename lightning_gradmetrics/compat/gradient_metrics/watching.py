"""Watches the forward passes of the user's modules, so that gradients can be collected from their graphs later."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_gradmetrics.classifier.notices import warn_once
from lightning_gradmetrics.compat.gradient_metrics.listener import HEARD, Listener
from lightning_gradmetrics.compat.gradient_metrics.ownership import mark_outputs
from lightning_gradmetrics.compat.gradient_metrics.planning import (
    COMPILED,
    SCRIPTED,
    ModulePlan,
    plan_module,
    samples_in,
)
from lightning_gradmetrics.engine.compilation.stance import eager
from lightning_gradmetrics.engine.tracing.calls import OpeningMode, tensors_in
from lightning_gradmetrics.engine.tracing.graph import without_storing_hooks
from lightning_gradmetrics.engine.tracing.model_state import attribute_key

__all__ = ["Watch"]

_watches: WeakSet[Watch] = WeakSet()
MOST_PLANS = 64
"""Largest number of plans that are stored for one module; the oldest is dropped."""

_plans: WeakKeyDictionary[nn.Module, dict[Any, ModulePlan]] = WeakKeyDictionary()


@dataclass
class _Watched:
    """The forward pass that is being recorded."""

    watch: Watch
    module: nn.Module
    listener: Listener
    depth: int = 1


class _Current(threading.local):
    watched: _Watched | None = None
    planning = False


_current = _Current()


class Watch:
    """Hooks on modules that start a :class:`Listener` in each forward pass and store nothing else.

    All watches share their listeners: one listener per forward pass collects for every watch.

    Args:
        modules: The modules to watch. Modules that run inside another watched module count as part of it.
        parameters: The parameters to collect for, by identity.
    """

    def __init__(self, modules: Sequence[nn.Module], parameters: Mapping[int, Tensor]) -> None:
        self.parameters = dict(parameters)
        self.why_unseen = ""
        self._handles: list[Any] = []
        inside: set[nn.Module] = set()
        for module in modules:
            inside |= set(module.modules()) - {module}
        for module in dict.fromkeys(modules):
            if isinstance(module, torch.jit.ScriptModule):  # it accepts no hooks
                self.why_unseen = SCRIPTED
            elif module not in inside:
                self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._after, with_kwargs=True, always_call=True))
        _watches.add(self)

    def __reduce__(self) -> Any:
        """Copy without hooks, because a copied module is not watched."""
        return Watch, ((), {})

    def remove(self) -> None:
        """Remove the hooks from the modules."""
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
            self.why_unseen = plan.reason
            return
        listener = Listener(plan, parameters, size)
        _current.watched = _Watched(self, module, listener)
        listener.__enter__()

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        current = _current.watched
        if current is None or current.watch is not self or current.module is not module:
            return
        current.depth -= 1
        if current.depth:
            return
        _current.watched = None
        listener = current.listener
        plan = listener.module_plan
        listener.__exit__(None, None, None)
        if listener.broken:
            self.why_unseen = listener.broken
            if listener.broken == COMPILED:
                plan.plan, plan.reason = None, COMPILED
            else:
                _forget(module, plan)
            return
        outputs = list(tensors_in(output))
        if len(outputs) == len(plan.outputs):
            mark_outputs(outputs, plan.outputs, listener)
            HEARD.add(listener)

    def tell(self, reason: str) -> None:
        """Warn once per reason that each loss takes a separate backward pass."""
        text = (
            f"gradient metrics take one backward pass per loss here, which is slow: {reason}. The values are the same"
        )
        warn_once(self, text, stacklevel=4)


def _can_listen() -> bool:
    """Return whether this is a plain forward pass with gradients."""
    if _current.planning or OpeningMode.active or torch.compiler.is_compiling():
        return False
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    transformed = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    return not transformed and torch._C._len_torch_dispatch_stack() == 0


def _wanted_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the module's parameters that any watch collects for."""
    wanted: set[int] = set()
    for watch in list(_watches):
        wanted |= watch.parameters.keys()
    parameters = {}
    for name, parameter in module.named_parameters():
        if id(parameter) in wanted:
            parameters[name] = parameter
    return parameters


def _plan(module: nn.Module, args: Any, kwargs: Any, parameters: Mapping[str, nn.Parameter]) -> ModulePlan:
    """Return the plan for a call."""
    known = _plans.setdefault(module, {})
    key = _key(module, args, kwargs, parameters)
    if key in known:
        return known[key]
    _current.planning = True
    try:
        with without_storing_hooks(), eager():
            plan = plan_module(module, args, kwargs, parameters)
    except Exception as error:  # an error in a trial run must not disturb the user's forward pass
        return ModulePlan(None, reason=f"{type(error).__name__}: {error}")
    finally:
        _current.planning = False
    tensors = tensors_in((args, kwargs))
    plan.autocast = any(torch.is_autocast_enabled(tensor.device.type) for tensor in tensors)
    # The trial runs may have shown that an attribute changes in every forward pass; it is then excluded from the key.
    known[_key(module, args, kwargs, parameters)] = plan
    while len(known) > MOST_PLANS:
        del known[next(iter(known))]
    return plan


def _key(module: nn.Module, args: Any, kwargs: Any, parameters: Mapping[str, nn.Parameter]) -> Hashable:
    """Return a key of everything that a plan depends on."""
    tensor_keys: list[Hashable] = []
    for tensor in tensors_in((args, kwargs)):
        autocast = torch.is_autocast_enabled(tensor.device.type)
        tensor_keys.append((tensor.shape[1:], tensor.dtype, tensor.device, autocast))
    modes = tuple((id(submodule), submodule.training) for submodule in module.modules())
    return tuple(tensor_keys), tuple(parameters), modes, attribute_key(module)


def _forget(module: nn.Module, plan: ModulePlan) -> None:
    """Delete the plan, which this call did not follow, so that the next call makes a new one."""
    known = _plans.get(module, {})
    for key, known_plan in list(known.items()):
        if known_plan is plan:
            del known[key]
