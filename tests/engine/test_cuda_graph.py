"""Recorded graphs follow inputs, labels and weights, with a recording of operators in place of CUDA's."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.engine.compilation import compiled, cuda_graph


class _Calls(TorchDispatchMode):
    """Records every operator with its arguments and results."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class _Graph:
    """Repeats the recorded operators and writes the results to their first places."""

    def __init__(self):
        self.calls, self.replays = [], 0

    def replay(self):
        self.replays += 1
        for func, args, kwargs, results in self.calls:
            again = func(*args, **kwargs)
            for place, value in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():  # not a view of a weight
                    place.copy_(value)


@pytest.fixture
def recordings(monkeypatch):
    """Tasks count as tasks on a GPU; return the list of all recordings."""
    graphs = []

    @contextmanager
    def recording(graph):
        graphs.append(graph)
        with _Calls(graph.calls):
            yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        CUDAGraph=_Graph,
        graph=recording,
        stream=lambda side: nullcontext(),
        current_stream=lambda device: stream,
        Stream=lambda device: stream,
    )
    monkeypatch.setattr(cuda_graph, "torch", SimpleNamespace(cuda=cuda, no_grad=torch.no_grad))
    monkeypatch.setattr(compiled, "_is_on_gpu", lambda task: True)
    return graphs


def _largest_error(found, expected) -> float:
    errors = []
    for key, value in expected.moments.items():
        errors.append(float((found.moments[key] - value).abs().max() / value.abs().max()))
    return max(errors)


class _Counting(nn.Module):
    """A classifier that may count its calls in a buffer."""

    def __init__(self, counts):
        super().__init__()
        self.head, self.counts = nn.Linear(3, 4), counts
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.counts:
            self.calls.add_(1)
        return self.head(x).tanh()


def _require_compiled(model, x, objective="pseudo_label"):
    found = gradient_statistics(model, x, objective, compile=True, per_parameter=True)
    expected = gradient_statistics(model, x, objective, engine="reference", per_parameter=True)
    assert _largest_error(found, expected) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("counts", [False, True])
def test_kernels_start_before_the_model_is_examined_if_they_change_nothing(recordings, monkeypatch, counts):
    torch.manual_seed(0)
    model, before = _Counting(counts).double().eval(), []
    for objective in ("pseudo_label", "uniform"):
        _require_compiled(model, torch.randn(5, 3).double(), objective)
        _require_compiled(model, torch.randn(5, 3).double(), objective)
    assert len(recordings) == 2
    monkeypatch.setattr(compiled, "auto_moments", None)  # later batches must not run eagerly
    record = compiled.ProgramState.__init__

    def examined(state, task):
        before.append([graph.replays for graph in recordings])
        record(state, task)

    monkeypatch.setattr(compiled.ProgramState, "__init__", examined)
    replays = [graph.replays for graph in recordings]
    for _ in range(2):
        _require_compiled(model, torch.randn(5, 3).double(), "uniform")
    assert [graph.replays for graph in recordings] == [replays[0], replays[1] + 2], "each batch runs once"
    assert before[0] == ([replays[0], replays[1] + 1] if not counts else replays)
    with torch.no_grad():
        model.head.weight.mul_(-2)
    _require_compiled(model, torch.randn(5, 3).double(), "pseudo_label")  # the other graph was started
    assert float(model.calls) == 0
    assert recordings[0].replays == replays[0] + 1


@pytest.mark.slow
def test_a_recorded_plan_follows_inputs_labels_and_weights(recordings, monkeypatch):
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double().eval()
    )

    def check(images):
        labels = torch.randint(3, (len(images),))
        arguments = {"per_parameter": True, "targets": labels}
        found = gradient_statistics(model, images, ["pseudo_label", "label"], compile=True, **arguments)
        expected = gradient_statistics(model, images, ["pseudo_label", "label"], engine="reference", **arguments)
        assert max(map(_largest_error, found, expected)) < 1e-8

    check(torch.randn(5, 2, 4, 4).double())
    assert len(recordings) == 1
    monkeypatch.setattr(compiled, "auto_moments", None)  # later batches must not run eagerly
    check(torch.randn(5, 2, 4, 4).double())
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[1].running_mean.add_(0.3)
    check(torch.randn(5, 2, 4, 4).double())
    assert len(recordings) == 1
    model[1].running_mean.data = torch.full((4,), 0.5).double()
    check(torch.randn(5, 2, 4, 4).double())
    assert len(recordings) == 2, "a tensor has moved, so the kernels are recorded again"
