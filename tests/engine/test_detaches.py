"""The detaches in traced operations."""

from __future__ import annotations

import torch

from lightning_gradmetrics.engine.tracing.dependence import DependenceTrace
from lightning_gradmetrics.engine.tracing.detaches import used_operations
from lightning_gradmetrics.engine.tracing.outline import Outline, Recording


def test_repeated_and_unused_detaches_are_no_operations():
    """Torch 2.8 detaches a stored result one to three times, and other versions do so once."""
    x = torch.ones(3, 2)
    recording = Recording(Outline({}))
    trace = DependenceTrace([x], [], recording)
    with trace, recording:
        y = x.mul(2)
        y.detach().detach()
        z = y.detach().detach().add(1)
        first = z.detach()
        second = first.detach()
        first.mul_(2)
    used = used_operations(trace, [second])
    assert [operation.name for operation in used] == ["mul", "detach", "add", "detach", "detach", "mul_"]
    made, detached, added, first, second, _ = used
    assert detached.input_serials == made.output_serials and added.input_serials == detached.output_serials
    assert first.input_serials == second.input_serials == added.output_serials
