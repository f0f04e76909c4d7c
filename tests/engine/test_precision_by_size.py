"""Models whose precision, or what autograd stores, depends on the size of the batch: exact, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.engine.refusals import CoupledSamplesError
from tests.engine.kinds import WIDTH, Net, error_of

SIZES = (3, 5, 1, 8, 8, 6, 4)
LARGE = 5


def _autocast_if(is_low: Callable[[Tensor], bool]) -> Callable[..., Tensor]:
    """A hidden layer under autocast for some batches."""

    def forward(net: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_low(x)):
            h = net.a(x)
        return net.head(torch.tanh(h.float()))

    return forward


def _small_branch(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.a(x))
    with torch.autocast("cpu", torch.bfloat16, enabled=len(x) > LARGE):
        branch = net.b(h)
    return net.head(h + 1e-3 * branch.float())


def _cast(net: Any, x: Tensor) -> Tensor:
    if len(x) <= LARGE:
        return net.head(torch.tanh(net.a(x)))
    weight, bias = net.a.weight.bfloat16(), net.a.bias.bfloat16()
    return net.head(torch.tanh(F.linear(x.bfloat16(), weight, bias).float()))


LOW_IN_LARGE_BATCHES = {
    "autocast": _autocast_if(lambda x: len(x) > LARGE),
    "a small branch under autocast": _small_branch,
    "casts": _cast,
}


def _float_batches() -> list[Tensor]:
    return [torch.randn(size, WIDTH) for size in SIZES]


@pytest.mark.parametrize("name", LOW_IN_LARGE_BATCHES)
def test_low_precision_in_large_batches_only_is_refused(name: str) -> None:
    torch.manual_seed(0)
    model = Net(LOW_IN_LARGE_BATCHES[name]).eval()
    for x in _float_batches():
        if len(x) <= LARGE:
            assert error_of(model, x) < 1e-4
            continue
        with pytest.raises(
            CoupledSamplesError, match=r"the precision of Net depends on the size of the batch.*bfloat16"
        ):
            error_of(model, x)


class _Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.layer, self.head = kind(4, 6, batch_first=True), nn.LazyLinear(3)
        self(torch.zeros(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(x)[0][:, -1])
        return logits


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, partial(nn.LSTM, proj_size=4)])
def test_recurrent_layers_under_autocast_have_the_types_of_torch(kind: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = _Recurrent(kind).eval(), torch.randn(5, 3, 4)
    exact = gradient_statistics(model, x, "pseudo_label", engine="reference").norm(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradient_statistics(model, x, "pseudo_label").norm(2)  # a warning of a slower way would be an error
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0)


@pytest.mark.filterwarnings("ignore:no fast rule")
def test_low_precision_at_every_size_is_accepted() -> None:
    torch.manual_seed(0)
    model = Net(_autocast_if(lambda x: True)).eval()
    for x in _float_batches():
        assert error_of(model, x) < 0.05


def _doubled(tensor: Tensor) -> Tensor:
    return tensor * 2 if tensor.is_floating_point() else tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _stored_by(pack: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return a forward pass whose graph stores each tensor as ``pack(input, tensor)``."""

    def forward(net: Any, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: pack(x, tensor), _same):
            return net.head(torch.tanh(net.b(torch.tanh(net.a(x)))))

    return forward


def _hooked_in_large_batches(net: Any, x: Tensor) -> Tensor:
    if len(x) <= LARGE:
        return net.head(torch.tanh(net.b(torch.tanh(net.a(x)))))
    with torch.autograd.graph.saved_tensors_hooks(_doubled, _same):
        return net.head(torch.tanh(net.b(torch.tanh(net.a(x)))))


STORED = {
    "hooks in large batches": _hooked_in_large_batches,
    "hooks that change tensors of large batches": _stored_by(lambda x, t: _doubled(t) if len(x) > LARGE else t),
}


@pytest.mark.filterwarnings("ignore:no fast rule")
@pytest.mark.parametrize("name", STORED)
def test_hooks_on_stored_tensors_at_some_sizes_do_not_change_a_samples_gradients(name: str) -> None:
    torch.manual_seed(0)
    model = Net(STORED[name]).double().eval()
    for size in SIZES:
        assert error_of(model, torch.randn(size, WIDTH, dtype=torch.float64)) < 1e-8


@pytest.mark.parametrize("size", [1e-22, 1e20])
@pytest.mark.parametrize("kind", ["rows", "sequence", "conv", "depthwise", "wide"])
def test_squares_neither_overflow_nor_vanish_in_single_precision(kind, size):
    """One input of 1e20 made the L2 norm of the first layer infinite; one of 1e-22 made it zero."""
    torch.manual_seed(0)
    first, shape = {
        "rows": (nn.Linear(4, 8, bias=False), (4,)),
        "sequence": (nn.Linear(4, 8, bias=False), (5, 4)),
        "conv": (nn.Conv1d(4, 8, 3, bias=False), (4, 6)),
        "depthwise": (nn.Conv1d(4, 4, 3, bias=False, groups=4), (4, 6)),
        "wide": (nn.Linear(2000, 200, bias=False), (2000,)),
    }[kind]
    x = torch.randn(8, *shape)
    model = nn.Sequential(first, nn.Flatten(), nn.Linear(first(x[:1]).numel(), 3)).eval()
    for wanted in (["l2"], ["std", "l1", "l2"]):
        for _ in range(2):
            gradient_statistics(model, x, "uniform", per_parameter=True, statistics=wanted)
        far = x.clone()
        far[3] *= size
        found = gradient_statistics(model, far, "uniform", per_parameter=True, statistics=wanted)
        loss = -model(far[3:4]).log_softmax(1).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        expected = torch.stack([gradient.double().norm() for gradient in gradients])
        assert 0 < float(expected[0]) < torch.inf
        torch.testing.assert_close(found.norm(2)[3].double(), expected, rtol=1e-4, atol=0)


class _Antisymmetric(nn.Module):
    """Two tiny logits: the gradient of the head's weight adds up to exactly zero, and its squares vanish."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return 1e-24 * self.head(x).sum(1)


def test_vanishing_squares_of_entries_that_add_up_to_zero_are_found():
    torch.manual_seed(0)
    model, x = _Antisymmetric().eval(), torch.randn(8, 5, 6)
    for _ in range(3):
        found = gradient_statistics(
            model, x, "pseudo_label", lambda name: name == "head.weight", statistics=("l2",)
        ).norm()
        expected = 1e-24 * x.double().sum(1).norm(dim=1) / 2**0.5
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
