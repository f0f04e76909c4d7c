"""The basic operations of a forward pass."""

from __future__ import annotations

import torch

from lightning_gradmetrics.engine.dependence import DependenceTrace
from lightning_gradmetrics.engine.outline import Outline, Recording


def test_detached_tensors_that_nothing_uses_are_no_operations():
    """Torch 2.8 detaches a stored result once or twice, and other versions do so once."""
    x = torch.ones(3, 2)
    recording = Recording(Outline({}))
    trace = DependenceTrace([x], [], recording)
    with trace, recording:
        y = x.mul(2)
        y.detach().detach()
        z = y.detach().add(1)
    names = [operation.name for operation in trace.operations]
    used = [operation.name for operation in trace.used_operations(z)]
    assert [name for name in used if name != "detach"] == ["mul", "add"]
    assert used[1] == "detach" and used.count("detach") * 3 == names.count("detach")
