"""A rule that is wrong for one row of a batch is found, whichever row it is: the sums of all gradients are computed a second time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradmetrics.engine import gradient_statistics, planned_batch
from lightning_gradmetrics.engine.passes.row_sums import RowSums
from lightning_gradmetrics.engine.passes.weighted_sums import _cancelled
from lightning_gradmetrics.engine.rules import RULES, Call, Rule, rule
from lightning_gradmetrics.engine.rules.sums import window_sums
from lightning_gradmetrics.engine.uses import LinearUse, RowsUse, Use
from tests.engine.cases import worst_difference

pytestmark = pytest.mark.filterwarnings("ignore:no fast rule")

LAYERS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "linear": (F.linear, lambda: nn.Linear(4, 3), (4,)),
    "linear with positions": (F.linear, lambda: nn.Linear(4, 3), (5, 4)),
    "strided convolution": (torch.conv2d, lambda: nn.Conv2d(4, 6, 3, 2, padding=1, groups=2), (4, 7, 7)),
    "depthwise convolution": (torch.conv1d, lambda: nn.Conv1d(4, 4, 3, groups=4, dilation=2), (4, 9)),
    "padded convolution": (torch.conv3d, lambda: nn.Conv3d(2, 3, 3, padding="same", bias=False), (2, 4, 4, 4)),
    "transposed convolution": (torch.conv_transpose2d, lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2), (4, 4, 4)),
    "batch norm": (torch.batch_norm, lambda: nn.BatchNorm1d(4), (4,)),
    "batch norm of images": (torch.batch_norm, lambda: nn.BatchNorm2d(4), (4, 3, 3)),
    "instance norm": (torch.instance_norm, lambda: nn.InstanceNorm1d(4, affine=True), (4, 5)),
    "layer norm": (torch.layer_norm, lambda: nn.LayerNorm((4, 5)), (3, 4, 5)),
    "group norm": (torch.group_norm, lambda: nn.GroupNorm(2, 4), (4, 3, 3)),
    "RMS norm": (torch.rms_norm, lambda: nn.RMSNorm(4), (3, 4)),
    "embedding": (torch.embedding, lambda: nn.Embedding(9, 4, padding_idx=2), (5,)),
}


def _model(make: Any, shape: tuple[int, ...], size: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = make()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    is_embedding = isinstance(layer, nn.Embedding)
    x = torch.randint(9, (size, *shape)) if is_embedding else torch.randn(size, *shape).double()
    width = layer.double()(x).flatten(1).shape[1]
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3)).double().eval(), x


def _compare(model: nn.Module, x: Tensor) -> None:
    found = gradient_statistics(model, x, "pseudo_label", per_parameter=True)
    expected = gradient_statistics(model, x, "pseudo_label", per_parameter=True, engine="reference")
    assert worst_difference(found, expected) < 1e-9


def _compare_one(model: nn.Module, x: Tensor, statistic: str) -> None:
    found = gradient_statistics(model, x, "pseudo_label", statistics=(statistic,))
    expected = gradient_statistics(model, x, "pseudo_label", statistics=(statistic,), engine="reference")
    torch.testing.assert_close(found.moments, expected.moments, rtol=1e-9, atol=1e-12)


def _wrong_for(row: int, right: Rule, factor: float = 1.01) -> Rule:
    """Return a rule that is wrong for one row of a batch of 20."""

    def wrong(call: Call, g: Tensor) -> Iterator[tuple[str, Use]]:
        factors = g.new_ones(len(g))
        if len(g) == 20:
            factors[row] = factor
        return right.uses(call, g * factors.view(-1, *[1] * (g.ndim - 1)))

    return dataclasses.replace(right, uses=wrong)


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[str], list[int]]]:
    """For each batch whose sums were compared, the parameters and the samples that differ."""
    noted: list[tuple[set[str], list[int]]] = []

    class Noted(RowSums):
        def differing(self, table: Any) -> list[int]:
            noted.append((set(self._sums[0]) - self._unknown, super().differing(table)))
            return noted[-1][1]

    monkeypatch.setattr(planned_batch, "RowSums", Noted)
    return noted


class _Mean(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(2).mean(2) if x.ndim > 2 else super().forward(x)


class _BeforeNorm(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.layer_norm(self.layer(x), (6,)).tanh().flatten(1, -2).mean(1))


class _BeforeSomeNorms(_BeforeNorm):
    """Normalises the samples with a positive first number only."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        return self.head(torch.where(x[:, :1, :1] > 0, F.layer_norm(hidden, (6,)), hidden).tanh().mean(1))


_SOME = torch.randn(20, 5, 4, generator=torch.Generator().manual_seed(0))
_SOME[:, 0, 0] = torch.tensor([-1.0, 1.0]).repeat_interleave(10)

CANCELLING: dict[str, tuple[Any, Any, Tensor]] = {
    "head": (F.linear, lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(20, 4)),
    "head of images": (torch.conv2d, lambda: _Mean(nn.Conv2d(2, 3, 3, padding=1)), torch.randn(20, 2, 4, 4)),
    "before a norm": (F.linear, lambda: _BeforeNorm(nn.Linear(4, 6)), torch.randn(20, 5, 4)),
    "before a norm of some samples": (F.linear, lambda: _BeforeSomeNorms(nn.Linear(4, 6)), _SOME),
    "embedding before a norm": (torch.embedding, lambda: _BeforeNorm(nn.Embedding(9, 6)), torch.randint(9, (20, 5))),
}
"""Models with a function whose output gradients add up to zero for each sample."""


@pytest.mark.parametrize("model", CANCELLING)
def test_a_wrong_row_is_found_where_sums_cancel(model: str, sums: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    function, make, x = CANCELLING[model]
    x = x.double() if x.is_floating_point() else x
    net, right = make().double().eval(), RULES[function]

    def swapped(call: Call, g: Tensor) -> Iterator[tuple[str, Use]]:
        is_last = g.shape[2 if function is torch.conv2d else -1] == (6 if "norm" in model else 3)
        return right.uses(call, torch.cat([g[:11], g[12:13], g[12:]]) if is_last and len(g) == 20 else g)

    _compare(net, x[:7])
    assert sums[-1][1] == []
    monkeypatch.setitem(RULES, function, dataclasses.replace(right, uses=swapped))
    _compare(net, x)
    assert sums[-1][1] == [11]


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_found(factor: float, sums: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    function, make, shape = LAYERS["linear"]
    model, x = _model(make, shape, 20)
    monkeypatch.setitem(RULES, function, _wrong_for(11, RULES[function], factor))
    _compare(model, x)
    assert 11 in sums[-1][1]


@pytest.mark.parametrize("layer", LAYERS)
def test_one_wrong_row_is_found(layer: str, sums: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a first batch, and in one of a new size. The sums of all parameters are right if the rule is."""
    function, make, shape = LAYERS[layer]
    model, x = _model(make, shape, 20)
    _compare(model, x[:7])
    assert sums == [(set(dict(model.named_parameters())), [])]
    right = RULES[function]
    for row, first in ((4, False), (11, True)):
        monkeypatch.setitem(RULES, function, _wrong_for(row, right))
        _compare(_model(make, shape, 20)[0] if first else model, x)
        assert sums[-1][1] == [row]


@pytest.mark.parametrize("statistic", ["l2", "linf", "mean", "l0.5"])
def test_one_wrong_row_is_found_by_one_statistic(statistic: str, sums: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums and L2 norms are computed in addition."""
    for layer in ("linear", "strided convolution", "layer norm"):
        function, make, shape = LAYERS[layer]
        model, x = _model(make, shape, 20)
        _compare_one(model, x[:7], statistic)
        assert sums[-1] == (set(dict(model.named_parameters())), [])
        with monkeypatch.context() as patch:
            patch.setitem(RULES, function, _wrong_for(11, RULES[function]))
            _compare_one(_model(make, shape, 20)[0], x, statistic)
            assert sums[-1][1] == [11]


def test_a_kernel_that_is_wrong_for_one_row_is_found(sums: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of the second table are right if only L2 norms without sums are wrong."""
    _, make, shape = LAYERS["linear with positions"]
    model, x = _model(make, shape, 20)
    right = LinearUse.moments

    def wrong(use: LinearUse, wanted: Any) -> Any:
        moments = right(use, wanted)
        if len(use) == len(x) and set(wanted) == {2.0}:
            moments[2.0][11] *= 1.01
        return moments

    monkeypatch.setattr(LinearUse, "moments", wrong)
    _compare_one(model, x, "l2")
    assert sums[-1][1] == [11]


def test_rules_of_users_are_checked_by_their_function(sums: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 3)).double()
    x, factors = torch.randn(9, 3).double(), torch.ones(9, 1, 1).double()
    monkeypatch.setattr("lightning_gradmetrics.engine.rules.base.RULES", RULES)

    def prelu(call: Call, g: Tensor) -> Iterator[tuple[str, Use]]:
        g = g * factors if len(g) == len(x) else g
        yield "weight", RowsUse((g * call.x.clamp(max=0)).sum(1))

    monkeypatch.setitem(RULES, torch.prelu, None)
    rule(torch.prelu, arguments="input weight", weights="weight")(prelu)
    _compare(model, x)
    assert sums[-1] == ({name for name, _ in model.named_parameters()}, [])
    factors[5] = 1.01
    _compare(nn.Sequential(*model), x)
    assert sums[-1][1] == [5]


@pytest.mark.parametrize("channels", [1, 6])
def test_sums_over_windows_are_those_of_a_convolution_with_ones(channels: int) -> None:
    images = torch.randn(2, channels, 5, 6).double()
    ones = images.new_ones(channels, 1, 3, 2)
    for options in ({}, {"padding": 1}, {"padding": (1, 0), "stride": [2, 1]}, {"padding": (4, 2)}, {"dilation": 2}):
        found = window_sums(torch.conv2d, images, (3, 2), options)
        torch.testing.assert_close(found, torch.conv2d(images, ones, groups=channels, **options))
    ones = images.new_ones(channels, 1, 3, 3)
    found = window_sums(torch.conv2d, images, (3, 3), {"padding": "same"})
    torch.testing.assert_close(found, torch.conv2d(images, ones, groups=channels, padding="same"))


def test_sums_that_cancel_in_one_sample_leave_out_their_slots() -> None:
    torch.manual_seed(0)
    gradients, slots = torch.randn(6, 5), ("weight", "bias")
    assert not _cancelled(slots, gradients, mixes_features=True)
    gradients[0] -= gradients[0].mean()
    assert set(_cancelled(slots, gradients, mixes_features=True)) == set(slots)
    assert set(_cancelled(slots, gradients, mixes_features=False)) == {"bias"}
