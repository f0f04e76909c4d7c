"""Norms against the reference: random shapes, layouts, values far from zero."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gradmetrics.classifier.frozen_norm import EarlyProduct
from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.engine.kernels import describe_kernels
from lightning_gradmetrics.engine.passes import path_record
from tests.engine.cases import worst_difference
from tests.engine.layers import SIZES, Summed, check_layer, normal


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["batch", "layer", "group", "instance", "rms"]), SIZES, SIZES, SIZES)
def test_norm(kind, n, groups, positions):
    channels = 2 * groups
    layer = {
        "batch": lambda: nn.BatchNorm1d(channels),
        "layer": lambda: nn.LayerNorm((channels, positions + 1)),
        "group": lambda: nn.GroupNorm(groups, channels),
        "instance": lambda: nn.InstanceNorm1d(channels, affine=True),
        "rms": lambda: nn.RMSNorm(positions + 1),
    }[kind]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    check_layer(layer, normal(n, channels, positions + 1))


def test_instance_norms_with_running_statistics_far_from_zero_are_as_exact_as_torch():
    torch.manual_seed(0)
    norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
    norm.running_mean.fill_(1e3)
    norm.running_var.fill_(1e-6)
    model, x = Summed(norm).eval(), 1e3 + 1e-3 * torch.randn(3, 4, 20, dtype=torch.float64).float()
    found = gradient_statistics(model, x, "uniform", per_parameter=True)
    expected = gradient_statistics(model, x, "uniform", per_parameter=True, engine="reference")
    assert worst_difference(found, expected) < 1e-3


class _NormOfFrames(nn.Module):
    """A group norm of the frames of a video, all of them on the first axis; far from zero, with channels last or transposed."""

    def __init__(self, layout: torch.memory_format | None) -> None:
        super().__init__()
        self.norm, self.layout = nn.GroupNorm(2, 4), layout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frames = x.flatten(0, 1).add(50)
        frames = frames.mT if self.layout is None else frames.contiguous(memory_format=self.layout)
        out: torch.Tensor = self.norm(frames).unflatten(0, x.shape[:2]).sum(1)
        return out


CRASHES = torch.__version__ < "2.14"
FRAMES_LAST = pytest.param(
    torch.channels_last,
    marks=pytest.mark.skipif(CRASHES, reason="torch 2.14: older ones crash where no layer before the norm is trained"),
)


@pytest.mark.parametrize("layout", [torch.contiguous_format, FRAMES_LAST, None])
def test_group_norm_of_frames(layout):
    layer = _NormOfFrames(layout)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    check_layer(layer, normal(3, 2, 4, 3, 5))


class _ChannelsLast(nn.Module):
    """Changes the layout."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("chosen", ["0.weight 2.weight", "2.weight 2.bias"])
def test_chosen_weights_of_group_norms_with_channels_last(engine, chosen):
    """Torch before 2.14 ends the process where the gradient of a group norm's input is not computed."""
    layers = [nn.Conv2d(3, 4, 3), nn.Identity(), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    inputs, options = normal(4, 3, 6, 6), {"parameters": chosen.split().__contains__, "engine": engine}
    expected = gradient_statistics(nn.Sequential(*layers).double(), inputs, "uniform", **options)
    layers[1] = _ChannelsLast()
    model = nn.Sequential(*layers)
    for size in (4, 1, 1):
        found = gradient_statistics(model, inputs[:size], "uniform", **options)
        torch.testing.assert_close(found.max, expected.max[:size], rtol=1e-9, atol=1e-12)


class _Normed(nn.Sequential):
    """Convolutions with group norms, activations in place, and an output that is used twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = self
        y = first(x)
        z = second(y)
        return third(torch.cat([y, z.mul(2).add_(y)], 1).transpose(2, 3))


def test_group_norms_between_layers():
    def block(channels: int) -> nn.Sequential:
        norm = nn.GroupNorm(2, 4)
        nn.init.normal_(norm.weight)
        return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), norm, nn.ReLU(inplace=True))

    layer, inputs = _Normed(block(3), block(4), block(8)), normal(4, 3, 5, 6)
    for batch in (inputs, inputs + 1, inputs - 1):
        check_layer(layer, batch)


class _Norms(nn.Module):
    """Batch norms in a row, on each frame of a video."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        for norm in (self.first, self.second, self.third):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                tensor.data.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.second(self.first(x.flatten(0, 1)).relu_())
        results = self.third(h.transpose(2, 3).tanh() + h).square().mean((2, 3))
        return results.unflatten(0, x.shape[:2]).sum(1)


@pytest.mark.parametrize("frames", [1, 3])
def test_batch_norms_compute_their_gradients_in_one_pass(frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_record, "MOST_BYTES", 0)
    taken = []
    original = EarlyProduct.taken
    monkeypatch.setattr(EarlyProduct, "taken", lambda *given: taken.append(original(*given)) or taken[-1])
    model, x, objectives = _Norms().double().eval(), normal(6, frames, 4, 5, 5), ["pseudo_label", "uniform"]
    expected = gradient_statistics(model, x, objectives, per_parameter=True, engine="reference")
    for _ in range(3):
        for one, other in zip(gradient_statistics(model, x, objectives, per_parameter=True), expected, strict=True):
            assert worst_difference(one, other) < 1e-9
    assert any(product is not None for product in taken) == describe_kernels(torch.float64).startswith("compiled")
