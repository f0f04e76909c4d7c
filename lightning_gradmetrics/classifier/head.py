"""The classification head: finding it, and seeing what passes through it in a forward that runs anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Capture", "HeadNotFoundError", "capturing", "linear_layers", "named_head", "returning_logits"]


class HeadNotFoundError(ValueError):
    """The model's classification head could not be found."""


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def named_head(model: nn.Module, name: str) -> nn.Linear:
    """The head of that name.

    Raises:
        HeadNotFoundError: If there is no such linear layer.
    """
    layers = linear_layers(model)
    if name not in layers:
        raise HeadNotFoundError(f"the model has no linear layer {name!r} to be its head; {_choices(layers)}")
    return layers[name]


def _choices(layers: dict[str, nn.Linear]) -> str:
    if not layers:
        return "it has no linear layer at all: choose scores that need no head, or a target other than 'head'"
    return f"its linear layers are: {', '.join(list(layers)[-12:])}. Name one, as in head='{list(layers)[-1]}'"


@dataclass
class Capture:
    """What hooks saw in one step: the calls of linear layers, and the outputs of the whole model.

    The tensors seen are the model's own; they are detached when they are read.

    Args:
        model: The model whose head is looked for.
        head: Its name, or ``None`` to find it: the linear layer whose output is what the model returns.
        logits: From the model's output to its logits.
    """

    model: nn.Module
    head: str | None
    logits: Callable[[Any], Tensor]
    calls: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    def clear(self) -> None:
        """Forget what was seen."""
        self.calls.clear()
        self.outputs.clear()

    def layers(self) -> dict[str, nn.Linear]:
        """The layers to watch: the named head, or every linear layer until the head is known."""
        return linear_layers(self.model) if self.head is None else {self.head: named_head(self.model, self.head)}

    def model_logits(self, size: int) -> Tensor | None:
        """What the model returned for ``size`` samples, ``(N, C)``; ``None`` if it was not called as a whole."""
        if not self.outputs:
            return None
        return _rows([self.logits(output).detach() for output in self.outputs], size, "the model")

    def features_and_logits(self, size: int) -> tuple[Tensor, Tensor]:
        """The head's input ``(N, D)`` and output ``(N, C)`` for ``size`` samples.

        Raises:
            HeadNotFoundError: If no linear layer's output is what the model returned.
        """
        if self.head is None:
            self.head = self._find()
        seen = [(a, z) for name, a, z in self.calls if name == self.head]
        if not seen:
            raise HeadNotFoundError(
                f"the head {self.head!r} was not called in this step; {_choices(linear_layers(self.model))}"
            )
        if any(a.ndim != 2 for a, _ in seen):
            raise HeadNotFoundError(
                f"the head {self.head!r} has an input of shape {tuple(seen[0][0].shape)}; the closed forms need pooled features (N, D)"
            )
        a, z = zip(*seen, strict=True)
        return _rows([t.detach() for t in a], size, f"the head {self.head!r}"), _rows(
            [t.detach() for t in z], size, f"the head {self.head!r}"
        )

    def _find(self) -> str:
        """The linear layer whose output the model returned; where the model was not called as a whole, the last one called."""
        called = [(name, z) for name, _, z in self.calls if z.ndim == 2]
        if self.outputs:
            result = self.logits(self.outputs[-1])
            called = [
                (name, z) for name, z in called if z is result or (z.shape == result.shape and torch.equal(z, result))
            ]
        if not called:
            raise HeadNotFoundError(
                f"the head of {type(self.model).__name__} could not be found: no linear layer's output is what the model returns "
                f"(a softmax or a scaling behind the head hides it); {_choices(linear_layers(self.model))}"
            )
        return called[-1][0]


def _rows(parts: list[Tensor], size: int, who: str) -> Tensor:
    """The parts of a batch, in the order of their calls."""
    rows = sum(len(part) for part in parts)
    if rows != size:
        raise ValueError(
            f"{who} saw {rows} rows in {len(parts)} calls during a step of {size} samples, so it is not known which are the samples'. "
            "Call the model once on the batch, or in consecutive parts of it"
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@contextmanager
def capturing(capture: Capture) -> Iterator[Capture]:
    """Watch the model inside the block; the hooks are gone after it, whatever happens."""
    handles = install(capture)
    try:
        yield capture
    finally:
        for handle in handles:
            handle.remove()


def install(capture: Capture) -> list[RemovableHandle]:
    """Put the hooks on; the caller removes them."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda module, arguments, output: capture.calls.append((name, arguments[0], output))

    handles = [layer.register_forward_hook(watch(name)) for name, layer in capture.layers().items()]
    handles.append(
        capture.model.register_forward_hook(lambda module, arguments, output: capture.outputs.append(output))
    )
    return handles


@contextmanager
def returning_logits(model: nn.Module, head: str | None, logits: Callable[[Any], Tensor]) -> Iterator[None]:
    """Inside the block the model returns its logits ``(N, C)``, whatever it makes of them otherwise.

    Args:
        model: The model.
        head: The name of the layer whose output they are, or ``None``.
        logits: From the model's output to them, where there is no such layer.
    """
    seen: list[Tensor] = []

    def replace(module: nn.Module, arguments: Any, output: Any) -> Tensor:
        found = torch.cat(seen) if len(seen) > 1 else seen[0] if seen else logits(output)
        seen.clear()
        return found

    with ExitStack() as stack:
        if head is not None:
            handle = named_head(model, head).register_forward_hook(
                lambda module, arguments, output: seen.append(output)
            )
            stack.callback(handle.remove)
        stack.callback(model.register_forward_hook(replace).remove)
        yield
