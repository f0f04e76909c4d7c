"""Finds models that draw random numbers from other generators than torch's default ones, which no second forward pass repeats."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import ne
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.notices import RANDOM, first_time
from lightning_gradmetrics.engine.inputs.samples import close_rows, logits_without_graph
from lightning_gradmetrics.engine.refusals import NotReproducibleError, not_reproducible, raise_if_out_of_memory
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.model_state import ForwardState

__all__ = ["SamplesAlone", "check_few_samples", "check_repeated_passes", "watching_generators"]

REPEATS = 16
"""How often the logits are computed if a forward pass has drawn numbers: a branch that one of three draws takes is missed by 1 in 600."""

FEW = 2
"""Number of samples in these passes."""


@contextmanager
def watching_generators(task: Task, state: ForwardState) -> Iterator[None]:
    """Refuse a model that draws from Python's generator, NumPy's or a separate one in this block, if that changes its logits.

    If it does not in several passes, such as a number that is drawn and not used, a warning is issued once.

    Args:
        task: The batch.
        state: The state of the model before the batch.

    Raises:
        NotReproducibleError: If the logits change.
    """
    generators = _generators(task.model)
    before = [state_of() for state_of in generators.values()]
    yield
    after = [state_of() for state_of in generators.values()]
    names = list(itertools.compress(generators, map(ne, before, after)))
    if not names:
        return
    check_few_samples(task, state)
    if first_time(task.model, RANDOM):
        warnings.warn(
            f"random numbers were drawn from {', '.join(names)} in a forward pass of {type(task.model).__name__}. The logits of "
            f"{REPEATS} passes are equal; if they depend on these numbers all the same, the gradients are those of one draw",
            stacklevel=2,
        )


def check_few_samples(task: Task, state: ForwardState | None = None) -> None:
    """Compare the logits of a few samples in many passes; a model that does not run on them is not compared.

    Raises:
        NotReproducibleError: If they differ.
    """
    state = ForwardState(task.model) if state is None else state
    try:
        check_repeated_passes(task.rows(0, FEW), state, REPEATS)
    except NotReproducibleError:
        raise
    except Exception as error:  # any error of the model
        raise_if_out_of_memory(error)
        state.restore()


def check_repeated_passes(task: Task, state: ForwardState, count: int = 2) -> Tensor:
    """Compare the logits of several forward passes from the same state, and return them.

    Raises:
        NotReproducibleError: If they differ.
    """
    state.restore()
    first = logits_without_graph(task, True)
    for _ in range(count - 1):
        state.restore()
        if not close_rows(logits_without_graph(task, True), first):
            raise not_reproducible(task.model)
    state.restore()
    return first


class SamplesAlone:
    """Finds a sample whose logits alone were those of one pass only, because the model counts its passes.

    Args:
        task: The batch.
        logits: Its logits.
        state: The state of the model before the batch.
    """

    def __init__(self, task: Task, logits: Tensor, state: ForwardState) -> None:
        self._task, self._logits, self._state = task, logits, state
        self._differing: dict[int, Tensor] = {}

    def note(self, number: int, alone: Tensor) -> None:
        """Keep the logits ``(1, C)`` of a sample alone if they are not those in the batch."""
        if len(self._differing) < FEW and not close_rows(alone.detach(), self._logits[number : number + 1]):
            self._differing[number] = alone.detach()

    def check(self) -> None:
        """Run the batch, and samples that differ from it, once more; the model must not have drawn random numbers.

        Raises:
            NotReproducibleError: If the logits are not those of the first pass.
        """
        passes = [(self._task, self._logits)]
        for number, alone in self._differing.items():
            passes.append((self._task.rows(number, number + 1), alone))
        for task, logits in passes:
            self._state.restore()
            if not close_rows(logits_without_graph(task, True), logits):
                raise not_reproducible(task.model)
        self._state.restore()


def _generators(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """Return functions that return the state of each generator: of Python, NumPy and attributes of the modules, by name."""
    found: dict[str, Callable[[], Any]] = {"Python's random": random.getstate, "NumPy": partial(_of_numpy, np.random)}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            state_of = _KINDS.get(type(value))
            if state_of is not None:
                found[".".join(filter(None, (name, attribute)))] = partial(state_of, value)
    return found


def _of_numpy(generator: Any) -> Any:
    state = generator.get_state()
    if isinstance(state, dict):
        return repr(state)
    kind, keys, *others = state
    return kind, keys.tobytes(), *others


def _of_torch(generator: torch.Generator) -> bytes:
    return generator.get_state().numpy().tobytes()


def _of_bits(generator: np.random.Generator) -> str:
    return repr(generator.bit_generator.state)


_KINDS: dict[type, Callable[[Any], Any]] = {
    torch.Generator: _of_torch,
    random.Random: random.Random.getstate,
    np.random.RandomState: _of_numpy,
    np.random.Generator: _of_bits,
}
"""The types of generators, and functions that return a comparable state."""
