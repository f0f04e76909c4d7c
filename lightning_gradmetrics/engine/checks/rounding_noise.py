"""Changes the results of all modules by rounding, to show how much rounding changes a model's logits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import map_tensors
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.gradients.precision import precision_of

__all__ = ["noisy_inputs", "rounding_noise"]

NOISE = 16
"""Largest relative change of an entry, in multiples of the precision of its type."""

_GENERATOR = torch.Generator().manual_seed(0)
"""Draws the noise, without advancing the user's generators."""


@contextmanager
def rounding_noise() -> Iterator[None]:
    """Multiply each entry of each module's output by a random number close to 1, inside the block.

    The hook is global, but it changes only the models that this thread runs.
    """
    thread = threading.get_ident()

    def change(module: nn.Module, inputs: Any, output: Any) -> Any:
        return _noisy(output) if threading.get_ident() == thread else output

    handle = nn.modules.module.register_module_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


def noisy_inputs(task: Task) -> Task:
    """Return a task whose floating inputs are changed by rounding."""
    return replace(task, inputs=map_tensors(task.inputs, _noisy))


def _noisy(output: Any) -> Any:
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.layout != torch.strided:
        return output
    with torch._C.DisableTorchFunction():
        noise = torch.rand(output.shape, generator=_GENERATOR).mul_(2).sub_(1).to(output.device, torch.float64)
        factors = 1 + NOISE * precision_of(output) * noise
        return (output * factors).to(output.dtype)
