"""Layers of random shapes against the reference."""

from __future__ import annotations

import warnings

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gradmetrics.engine import gradient_statistics
from tests.engine.cases import worst_difference

SIZES = st.integers(1, 4)


class Summed(nn.Module):
    """A layer, and logits that weigh each entry of its output differently."""

    def __init__(self, layer: nn.Module, take: int | None = None) -> None:
        super().__init__()
        self.layer, self.take = layer, take

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        out = self.layer(*inputs)
        out = (out if self.take is None else out[self.take]).flatten(1)
        weights = torch.arange(1.0, 1 + out.shape[1], dtype=out.dtype).sin()
        return torch.stack([(out * weights).sum(1), (out.square() * weights).sum(1), out.tanh().sum(1)], 1)


def _check(layer: nn.Module, *inputs: torch.Tensor, take: int | None = None) -> None:
    model = Summed(layer.double(), take).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*padding='same' with even kernel.*")
        objectives = ["pseudo_label", "uniform"]
        found = gradient_statistics(model, inputs, objectives, per_parameter=True)
        expected = gradient_statistics(model, inputs, objectives, per_parameter=True, engine="reference")
    for one, other in zip(found, expected, strict=True):
        assert worst_difference(one, other) < 1e-9


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@settings(max_examples=15, deadline=None)
@given(st.lists(SIZES, max_size=3), SIZES, SIZES, st.booleans(), SIZES)
def test_linear(shape, inputs, outputs, bias, n):
    _check(nn.Linear(inputs, outputs, bias), _normal(n, *shape, inputs))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_convolution(data):
    dims, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    channels, features = (groups * data.draw(st.integers(1, 2)) for _ in range(2))
    kernel = data.draw(st.integers(1, 3))
    dilation = data.draw(st.integers(1, 2))
    padding = data.draw(st.sampled_from([0, 1, "same"]))
    stride = 1 if padding == "same" else data.draw(st.integers(1, 2))
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = kind(channels, features, kernel, stride, padding, dilation, groups, data.draw(st.booleans()), mode)
    sizes = data.draw(st.lists(st.integers(5, 6), min_size=dims, max_size=dims))
    _check(layer, _normal(data.draw(SIZES), channels, *sizes))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_transposed_convolution(data):
    dims, groups, stride = (data.draw(st.integers(1, k)) for k in (3, 2, 3))
    channels, features = (groups * data.draw(st.integers(1, 2)) for _ in range(2))
    kernel, padding, dilation = (data.draw(st.integers(*k)) for k in ((2, 3), (0, 1), (1, 2)))
    extra = data.draw(st.integers(0, max(stride, dilation) - 1))
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    layer = kind(channels, features, kernel, stride, padding, extra, groups, data.draw(st.booleans()), dilation)
    sizes = data.draw(st.lists(st.integers(3, 4), min_size=dims, max_size=dims))
    _check(layer, _normal(data.draw(SIZES), channels, *sizes))


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
    _check(layer, _normal(n, channels, positions + 1))


@settings(max_examples=15, deadline=None)
@given(SIZES, st.integers(1, 6), st.sampled_from([None, 0, 1]), SIZES)
def test_embedding(rows, length, padding, n):
    _check(nn.Embedding(rows + 1, 3, padding), torch.randint(0, rows + 1, (n, length)))


@settings(max_examples=10, deadline=None)
@given(SIZES, SIZES, SIZES, st.booleans(), st.booleans())
def test_attention(n, queries, keys, batch_first, cross):
    layer = nn.MultiheadAttention(4, 2, batch_first=True, kdim=3 if cross else None, vdim=3 if cross else None)
    other = _normal(n, keys, 3 if cross else 4)
    _check(layer, _normal(n, queries, 4), other, other, take=0)
    same = _normal(n, queries, 4)
    _check(nn.MultiheadAttention(4, 2, batch_first=True), same, same, same, take=0)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]), SIZES, SIZES, st.integers(1, 2), st.booleans(), st.booleans())
def test_recurrent(kind, n, steps, layers, bias, both):
    layer = kind(3, 2, layers, bias=bias, batch_first=True, bidirectional=both)
    _check(layer, _normal(n, steps, 3), take=0)
