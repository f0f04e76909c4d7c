"""Recorded graphs follow inputs, labels and weights, with a recording of operators in place of CUDA's."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_gradmetrics.engine import compiled, cuda_graph, gradient_statistics


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
        self.calls = []

    def replay(self):
        for func, args, kwargs, results in self.calls:
            again = func(*args, **kwargs)
            for place, value in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(place, torch.Tensor):
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
    monkeypatch.setattr(cuda_graph, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(compiled, "_is_on_gpu", lambda task: True)
    return graphs


def _largest_error(found, expected) -> float:
    errors = []
    for key, value in expected.moments.items():
        errors.append(float((found.moments[key] - value).abs().max() / value.abs().max()))
    return max(errors)


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
