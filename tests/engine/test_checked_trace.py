"""Guards that are checked without torch.compile: they hold only while torch.compile itself would use the trace."""

import gc

import pytest
import torch
from torch import nn

from lightning_gradmetrics.engine.compilation.checked_trace import CheckedTrace

pytestmark = pytest.mark.slow


class _Layer(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor, self.weight = factor, nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x * self.weight * self.factor


@pytest.fixture
def traced():
    names = {"__builtins__": __builtins__}
    source = "def run(model, x):\n    return model(x) + offset()\n\ndef offset():\n    return 1"
    exec(compile(source, __file__, "exec"), names)  # torch 2.8 wraps functions without a file
    compiled = torch.compile(names["run"], backend="eager", fullgraph=True, dynamic=False)
    model, x = _Layer(2.0), torch.randn(3, 4)
    compiled(model, x)
    return names, CheckedTrace(names["run"]), model, x


def test_a_trace_runs_with_present_tensors_and_holds_for_an_unchanged_model(traced):
    _, trace, model, x = traced
    assert trace.holds(model, x)
    model.weight = nn.Parameter(torch.randn(4))
    assert trace.holds(model, x)
    torch.testing.assert_close(trace.run(model, x), model(x) + 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda names, model: setattr(model, "factor", 3.0),
        lambda names, model: setattr(model, "weight", nn.Parameter(torch.randn(1))),
        lambda names, model: setattr(model, "weight", nn.Parameter(torch.randn(4).double())),
        lambda names, model: exec("def offset():\n    return 2", names),
        lambda names, model: torch._dynamo.reset(),
    ],
)
def test_a_trace_does_not_hold_after_a_change(traced, change):
    names, trace, model, x = traced
    change(names, model)
    gc.collect()
    assert not trace.holds(model, x)
    assert not trace.holds(model, x[1:])


def test_a_trace_does_not_hold_once_an_object_is_freed_that_it_identifies_by_its_address(traced):
    names, trace, model, x = traced
    guards = trace._guards
    assert guards.cache_entry is not None
    del names["offset"]
    gc.collect()
    assert guards.cache_entry is None and not trace.holds(model, x)


def test_functions_without_a_single_trace_are_refused(traced):
    with pytest.raises(LookupError, match="0 traces"):
        CheckedTrace(lambda x: x)
