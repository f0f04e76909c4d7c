"""Results that combine samples are ignored if they do not reach the logits, and refused or exact if they do, whatever a gate shows."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from lightning_gradmetrics.engine import auto, gradient_statistics
from lightning_gradmetrics.engine.refusals import REFUSALS

WIDTH = 6
THREAD = ThreadPoolExecutor(1)


class _Model(nn.Module):
    """Stores a result that combines samples, which may change the hidden features if it is larger than a threshold.

    Args:
        stored: Computes and stores the result.
        used: Returns the hidden features after it has changed them.
        threshold: The largest value that does not change them.
    """

    def __init__(self, stored, used=None, threshold: float = 5.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.scale = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4), nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("kept", torch.zeros(WIDTH))
        self.stored, self.used, self.threshold = stored, used, threshold

    def gate(self, value: Tensor) -> Tensor:
        """Return zeros below the threshold."""
        return torch.relu(value - self.threshold)

    def forward(self, x: Tensor) -> Tensor:
        hidden = 2 * torch.tanh(self.body(x))  # of which autograd stores nothing
        self.result = self.stored(self, x, hidden)
        if self.used is not None:
            hidden = self.used(self, hidden, self.result)
        logits: Tensor = self.head(hidden)
        return logits


def _mean(model: _Model, x: Tensor, hidden: Tensor) -> Tensor:
    return (x * x.mean(0)).mean(0)


def _products(model: _Model, x: Tensor, hidden: Tensor) -> Tensor:
    return (hidden @ hidden.T).square().sum()


def _balance(model: _Model, x: Tensor, hidden: Tensor) -> Tensor:
    return (hidden.softmax(1).mean(0) * model.scale * hidden.mean(0)).sum()


def _largest(model: _Model, x: Tensor, hidden: Tensor) -> Tensor:
    return hidden.norm(dim=1).topk(1).values


def _running(model: _Model, x: Tensor, hidden: Tensor) -> Tensor:
    return model.kept.mul_(0.9).add_(0.1 * (hidden * hidden.mean(0)).sum(0).detach())


@pytest.mark.parametrize("stored", [_mean, _products, _balance, _largest, _running])
def test_results_that_do_not_reach_the_logits_are_ignored(stored) -> None:
    model = _Model(stored).double().eval()
    for size in (7, 7, 5, 2, 7):
        x = torch.randn(size, WIDTH).double()
        expected = gradient_statistics(model, x, "pseudo_label", per_parameter=True, engine="reference").norm(2)
        found = gradient_statistics(model, x, "pseudo_label", per_parameter=True).norm(2)
        assert torch.allclose(found, expected, 1e-9, 1e-12)
    (strategies,) = auto._STRATEGIES[model].values()
    assert all(strategy.sizes is not None for strategy in strategies)  # the proof covers later batches
    assert not model.kept.any()


def test_results_that_a_model_stores_outside_itself_keep_their_values() -> None:
    kept: list[Tensor] = []

    def store(model: _Model, x: Tensor, hidden: Tensor) -> Tensor:
        kept.append((hidden.detach().softmax(1).mean(0) / 2).sum().view(1))
        return kept[-1]

    gradient_statistics(_Model(store).double().eval(), torch.randn(5, WIDTH, dtype=torch.float64), "pseudo_label")
    assert kept
    for value in kept:
        torch.testing.assert_close(value, torch.full_like(value, 0.5))


@pytest.mark.filterwarnings("ignore")
def test_results_without_memory_are_not_replaced() -> None:
    """Derivatives of constants in forward mode are zeros without memory, which a write would end the process for."""
    model = (
        _Model(lambda model, x, hidden: torch.func.jvp(lambda z: z * model.scale, (x,), (x,))[1].mean(0))
        .double()
        .eval()
    )
    for _ in range(2):
        x = torch.randn(4, WIDTH).double()
        expected = gradient_statistics(model, x, "pseudo_label", engine="reference").norm(2)
        assert torch.allclose(gradient_statistics(model, x, "pseudo_label").norm(2), expected, 1e-9, 1e-12)


def _added(model, hidden, result):
    return hidden + model.gate(result)


def _in_place(model, hidden, result):
    hidden.mul_(1 + model.gate(result))
    return hidden


def _through_a_view(model, hidden, result):
    hidden.t()[:3].mul_(1 + model.gate(result)[:3, None])
    return hidden


def _through_data(model, hidden, result):
    return hidden + model.gate(result.data)


def _through_a_buffer(model, hidden, result):
    model.kept.copy_(result)
    return hidden + model.gate(model.kept)


def _read(model, hidden, result):
    return hidden * 2 if result.max().item() > model.threshold else hidden


def _read_in_a_thread(model, hidden, result):
    return hidden * 2 if THREAD.submit(lambda: result.max().item()).result() > model.threshold else hidden


def _read_by_numpy(model, hidden, result):
    return hidden + model.gate(torch.from_numpy(result.detach().numpy().copy()))


def _in_a_thread(model, hidden, result):
    return THREAD.submit(lambda: hidden + model.gate(result)).result()


def _without_functions(model, hidden, result):
    with torch._C.DisableTorchFunction():
        return hidden + model.gate(result)


def _by_a_hook(model, hidden, result):
    hidden.register_hook(lambda gradient: gradient * (1 + model.gate(result)))
    return hidden


class _Stored(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, result):
        ctx.result = result
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 + torch.relu(ctx.result - 5)), None


def _by_a_function(model, hidden, result):
    return _Stored.apply(hidden, result)


_USES = [
    _added,
    _in_place,
    _through_a_view,
    _through_data,
    _through_a_buffer,
    _read,
    _read_by_numpy,
    _without_functions,
]
_OTHERS = [_read_in_a_thread, _in_a_thread, _by_a_hook, _by_a_function]
_PER_SAMPLE = [_by_a_hook, _by_a_function]
"""Uses in the backward pass, where each sample may run alone."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opens", [0, 2])
@pytest.mark.parametrize(
    ("used", "value"),
    [*itertools.product(_USES, [3.0, 20.0]), *itertools.product(_OTHERS, [20.0])],
)
def test_results_that_reach_the_logits_are_refused_or_exact(used, value: float, opens: int) -> None:
    """From batch number ``opens`` on, the gate is open for one sample alone, and for the whole batch if the value is 20."""
    model, refused = _Model(_mean, used).double().eval(), []
    for number in range(4):
        x = torch.randn(6, WIDTH).double() * 0.1
        if number >= opens:
            x[0] = value
        expected = gradient_statistics(model, x, "pseudo_label", per_parameter=True, engine="reference").norm(2)
        try:
            found = gradient_statistics(model, x, "pseudo_label", per_parameter=True).norm(2)
        except REFUSALS:
            refused.append(number)
            continue
        assert torch.allclose(found, expected, 1e-9, 1e-12)
    assert {*range(opens, 4)} <= {*refused} or used in _PER_SAMPLE
    for strategies in auto._STRATEGIES.get(model, {}).values():
        assert all(strategy.sizes is None for strategy in strategies)  # no proof covers later batches
