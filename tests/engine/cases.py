"""Small models, one for each feature that the engine must support."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_gradmetrics.engine import GradientStatistics

Case = Callable[[], tuple[nn.Module, Tensor]]


def _has_grouped_products() -> bool:
    try:
        torch._grouped_mm(torch.zeros(2, 8), torch.zeros(1, 8, 8), offs=torch.tensor([2], dtype=torch.int32))
    except (AttributeError, RuntimeError):
        return False
    return True


needs_grouped_products = pytest.mark.skipif(
    not _has_grouped_products(), reason="this torch has no grouped products in float32"
)


class Recurrent(nn.Module):
    """A recurrent layer, and a head on all of its outputs."""

    def __init__(self, layer: nn.Module, select: Callable[[Any], Tensor] = lambda out: out[0], width: int = 40) -> None:
        super().__init__()
        self.layer, self.select, self.head = layer, select, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.select(self.layer(x)).flatten(1))


class Cells(nn.Module):
    """Recurrent cells in a loop of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn, self.head = (
            nn.LSTMCell(6, 4),
            nn.GRUCell(4, 4),
            nn.RNNCell(4, 4),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        state, hidden, plain = None, None, None
        for step in x.unbind(1):
            state = self.lstm(step, state)
            hidden = self.gru(state[0], hidden)
            plain = self.rnn(hidden, plain)
        return self.head(plain)


class Packed(nn.Module):
    """A packed sequence, which no fast rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), 5), batch_first=True)
        return self.head(self.lstm(packed)[1][0][0])


class Checkpointed(nn.Module):
    """Activation checkpointing, of both kinds, at the beginning or in the middle."""

    def __init__(self, reentrant: bool, first: bool = False) -> None:
        super().__init__()
        self.stem = nn.Identity() if first else nn.Linear(6, 6)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head, self.reentrant = nn.Linear(8, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, self.stem(x.mean(1)), use_reentrant=self.reentrant))


class Tied(nn.Module):
    """An embedding that is also the output layer, and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(9, 6, padding_idx=0), nn.Linear(6, 6)
        self.out = nn.Linear(6, 9, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.layer(self.table(x)).relu())).mean(1)


class Raw(nn.Module):
    """Parameters in all kinds of operations."""

    def __init__(self) -> None:
        super().__init__()

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape) / 2)

        self.token, self.position, self.scale, self.matrix = new(1, 1, 6), new(1, 6, 6), new(6), new(6, 6)
        self.heads, self.temperature, self.unused, self.queries = new(2, 3, 3), new(), new(3), new(4, 6)
        self.mixing, self.table = new(6, 6), new(2, 3)
        self.prelu, self.bilinear = nn.PReLU(6), nn.Bilinear(6, 6, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))
        self.register_buffer("index", torch.randint(0, 2, (6,)))
        self.index: Tensor

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        x = torch.cat([self.token.expand(n, -1, -1), x], 1) + self.position
        x = (x * self.scale) @ self.matrix
        x = torch.einsum("ntd,de->nte", x, self.mixing)
        x = self.prelu(x.transpose(1, 2)).transpose(1, 2)
        parts = x.reshape(n, 6, 2, 3).transpose(1, 2) @ self.heads
        bias = self.table[self.index].view(6, 3).repeat(1, 2)[None]
        x = x + parts.transpose(1, 2).reshape(n, 6, 6) * self.temperature.exp() + bias
        x = F.scaled_dot_product_attention(self.queries.repeat(n, 1, 1), x, x).mean(1)
        return self.normed(self.frozen(self.bilinear(x, x)).relu())


class Seq2Seq(nn.Module):
    """``nn.Transformer``: self-attention and cross-attention, the samples on the first or second axis."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.body = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=batch_first)
        self.stem, self.head, self.batch_first = nn.Linear(6, 8), nn.Linear(8, 3), batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x if self.batch_first else x.transpose(0, 1))
        return self.head(self.body(x, x)).mean(1 if self.batch_first else 0)


class Minor(nn.Module):
    """Flattens an axis so that the sample index varies fastest."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 5), nn.Linear(5, 3), nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        steps = x.transpose(0, 1)
        flat = self.norm(self.a(steps.reshape(-1, 6)).tanh())
        return self.b(flat).view(*steps.shape[:2], 3).sum(0)


class Lookup(nn.Module):
    """Embeddings of samples and of positions; one is inside ``no_grad``, so no gradient reaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.kind = nn.Embedding(9, 6), nn.Embedding(12, 6), nn.Embedding(2, 6)
        self.head, self.still = nn.Linear(6, 3), nn.Embedding(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(x.shape[1], device=x.device))
        y = self.words(x) + places + self.kind(torch.zeros_like(x))
        with torch.no_grad():
            y = y + self.still(x)
        return self.head(y.tanh()).sum(1)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6, bias=False),
        nn.GroupNorm(2, 6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 2, padding="same", dilation=1),
        nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.InstanceNorm2d(4, affine=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def volumes() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 4, (1, 3, 2), stride=(1, 2, 1)),
        nn.BatchNorm3d(4),
        nn.Tanh(),
        nn.ConvTranspose3d(4, 2, 2),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def sequences() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(5, 6, 3, padding=2, dilation=2, padding_mode="circular"),
        nn.RMSNorm(6),
        nn.ConvTranspose1d(6, 4, 2),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        nn.LayerNorm((4, 7)),
        nn.Flatten(),
        nn.Linear(28, 3),
    )


def frames() -> nn.Module:
    """Several images per sample, folded into the batch axis."""

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            features = self.norm(self.conv(x.flatten(0, 1)[:, None])).tanh().mean((2, 3))
            return self.head(features).view(*x.shape[:2], 2).logsumexp(1)

    return Frames()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)
    return Recurrent(nn.TransformerEncoder(layer, 2), lambda out: out, 30)


class AddedInPlace(nn.Module):
    """Linear layers over positions, whose results torch returns as views, and which are changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.first(x).relu_())
        out += x
        return self.head(out)[:, 1:].mul_(x[:, 1:, :1]).mean(1)


def _x(n: int = 5) -> Tensor:
    return torch.randn(n, 5, 6)


CASES: dict[str, Case] = {
    "linear": lambda: (nn.Sequential(nn.Flatten(), nn.Linear(30, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)), _x()),
    "convolutional": lambda: (convolutional(), torch.randn(5, 3, 8, 8)),
    "channels_last": lambda: (
        convolutional().to(memory_format=torch.channels_last),
        torch.randn(5, 3, 8, 8).to(memory_format=torch.channels_last),
    ),
    "volumes": lambda: (volumes(), torch.randn(5, 1, 3, 5, 4)),
    "sequences": lambda: (sequences(), _x()),
    "frames": lambda: (frames(), torch.randn(5, 2, 5, 6)),
    "lstm": lambda: (Recurrent(nn.LSTM(6, 4, 2, batch_first=True, bidirectional=True)), _x()),
    "lstm_projected": lambda: (
        Recurrent(nn.LSTM(6, 4, batch_first=True, proj_size=3, bias=False), lambda o: o[1][1].transpose(0, 1), 4),
        _x(),
    ),
    "gru": lambda: (Recurrent(nn.GRU(6, 4, 2, batch_first=True), width=20), _x()),
    "rnn": lambda: (Recurrent(nn.RNN(6, 4, batch_first=True, nonlinearity="relu"), width=20), _x()),
    "cells": lambda: (Cells(), _x()),
    "checkpoint": lambda: (Checkpointed(False), _x()),
    "checkpoint_first": lambda: (Checkpointed(False, first=True), _x()),
    "checkpoint_reentrant": lambda: (Checkpointed(True), _x()),
    "tied": lambda: (Tied(), torch.randint(0, 9, (5, 7))),
    "raw": lambda: (Raw(), _x()),
    "seq2seq": lambda: (Seq2Seq(True), _x()),
    "seq2seq_second_axis": lambda: (Seq2Seq(False), _x()),
    "encoder": lambda: (encoder(), _x()),
    "added_in_place": lambda: (AddedInPlace(), _x()),
    "minor": lambda: (Minor(), _x()),
    "lookup": lambda: (Lookup(), torch.randint(0, 9, (5, 7))),
}


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A case's model in eval mode, and its batch."""
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, x = CASES[name]()
        model.eval()(x)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()  # type: ignore[union-attr, operator]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
                module.weight.normal_()
    return model.to(dtype), x.to(dtype) if x.is_floating_point() else x


def worst_difference(found: GradientStatistics, expected: GradientStatistics, floor: float = 1e-5) -> float:
    """The largest difference of a moment, for sums relative to the L1 norm, for extremes to L2.

    A parameter whose gradient is zero up to rounding, such as a key's bias in attention, is measured against
    ``floor`` times the
    largest.
    """
    l1, l2 = expected.moments[1.0], expected.moments[2.0].sqrt()
    worst = 0.0
    for key in expected.moments.keys() & {
        "max",
        "min",
    }:  # the squares may underflow, but the extremes are exact
        l2 = torch.maximum(l2, expected.moments[key].abs())
    for key, value in expected.moments.items():
        scale = {"sum": l1, 1.0: l1, 2.0: expected.moments[2.0]}.get(key, l2)  # type: ignore[call-overload]
        least = floor * scale.amax() if scale.numel() else 0
        difference = (found.moments[key] - value).abs() / (scale + least).clamp(min=1e-300)
        assert torch.isfinite(difference).all(), key
        worst = max(worst, float(difference.amax()) if difference.numel() else 0.0)
    return worst
