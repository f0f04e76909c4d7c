"""Calls on images whose gradients keep the layout of the images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.engine.passes import image_calls, path_record
from tests.engine.cases import worst_difference

CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "mean": (Tensor.mean, ((2, 3),), {}),
    "mean, axes kept": (torch.mean, (), {"dim": [-1, -2], "keepdim": True}),
    "pooling": (F.adaptive_avg_pool2d, ((1, 1),), {}),
    "every second pixel": (
        Tensor.__getitem__,
        ((slice(None), slice(None), slice(None, None, 2), slice(1, None, 2)),),
        {},
    ),
    "one row": (Tensor.__getitem__, ((..., 0, slice(None)),), {}),
    "mean over channels": (Tensor.mean, ((1, 2),), {}),
    "mean in double precision": (torch.mean, ((2, 3),), {"dtype": torch.float64}),
    "mean of all": (torch.mean, (), {}),
    "pooling to four": (F.adaptive_avg_pool2d, (2,), {}),
}


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("name", CALLS)
def test_values_strides_and_gradients_are_those_of_the_call(name: str, layout: torch.memory_format) -> None:
    function, args, kwargs = CALLS[name]
    x = torch.randn(3, 5, 4, 6).contiguous(memory_format=layout).requires_grad_()
    found, expected = image_calls.result_for_images(function, (x, *args), kwargs), function(x, *args, **kwargs)
    assert torch.equal(found, expected) and found.stride() == expected.stride()
    weights = torch.randn_like(expected)
    of_found, of_expected = (torch.autograd.grad(result, x, weights)[0] for result in (found, expected))
    assert torch.equal(of_found, of_expected)


@pytest.mark.parametrize("name", ["mean", "pooling", "every second pixel"])
def test_gradients_meet_others_in_one_layout(name: str) -> None:
    function, args, kwargs = CALLS[name]
    x = torch.randn(3, 5, 4, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    h = x.relu()
    result = image_calls.result_for_images(function, (h, *args), kwargs)
    (gradient,) = torch.autograd.grad(result.sum() + h.sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    (of_call,) = torch.autograd.grad(function(h := x.relu(), *args, **kwargs).sum(), h)
    assert not of_call.is_contiguous(memory_format=torch.channels_last)  # otherwise torch needs no help


class _Net(nn.Module):
    """A squeeze-and-excitation block, and a shortcut of every second pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.squeeze = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.second, self.head = nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        h = h * self.squeeze(F.adaptive_avg_pool2d(h, 1)).sigmoid()
        h = (self.second(h) + h[:, :, ::2, ::2]).relu()
        logits: Tensor = self.head(h.mean((2, 3)))
        return logits


@pytest.mark.parametrize("is_large", [False, True])
def test_known_paths_run_such_calls(is_large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_large:
        monkeypatch.setattr(path_record, "MOST_BYTES", 0)
    used: list[str] = []

    def noting(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: used.append(name) or run(*args, **kwargs)

    noted = {function: noting(function.__name__, run) for function, run in image_calls._CALLS.items()}
    monkeypatch.setattr(image_calls, "_CALLS", noted)
    torch.manual_seed(0)
    model, x = _Net().eval(), torch.randn(7, 3, 8, 8)
    for _ in range(4):
        found = gradient_statistics(model, x, "pseudo_label", per_parameter=True)
    assert {*used} == {"adaptive_avg_pool2d", "__getitem__", "mean"}
    expected = gradient_statistics(model, x, "pseudo_label", per_parameter=True, engine="reference")
    assert worst_difference(found, expected) < 1e-4
