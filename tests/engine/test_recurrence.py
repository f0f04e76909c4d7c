"""LSTM layers run as one node of the graph; their gradients are those of torch's own layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lightning_gradmetrics as lgm
from lightning_gradmetrics.engine.auto import _STRATEGIES
from lightning_gradmetrics.engine.planning import probe
from lightning_gradmetrics.engine.refusals import CoupledSamplesError
from lightning_gradmetrics.engine.tracing.dependence import DependenceTrace

Use = Callable[["Reader", Tensor], Tensor]


class Reader(nn.Module):
    """An LSTM whose results are used in one of several ways."""

    def __init__(self, use: Use, **options: bool) -> None:
        super().__init__()
        self.layers, self.first = nn.LSTM(5, 6, 2, batch_first=True, **options), nn.Linear(5, 6)
        self.head, self.use = nn.Linear(12 if self.layers.bidirectional else 6, 3), use

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(self, x))


def last_output(net: Reader, x: Tensor) -> Tensor:
    return net.layers(x)[0][:, -1]


def changed_in_place(net: Reader, x: Tensor) -> Tensor:
    outputs, (hidden, cell) = net.layers(x)
    hidden.mul_(2)
    cell.add_(1)
    return hidden[0] * cell[-1] + outputs.relu_().mean(1)


def states_of_an_encoder(net: Reader, x: Tensor) -> Tensor:
    first = net.first(x[:, 0]).tanh().expand(2, -1, -1).contiguous()
    return net.layers(x, (first, first.sigmoid()))[0].mean(1)


def called_twice(net: Reader, x: Tensor) -> Tensor:
    outputs, state = net.layers(x)
    return net.layers(outputs[..., :5] + x, state)[0][:, -1]


USES: dict[str, tuple[Use, dict[str, bool]]] = {
    "last output": (last_output, {}),
    "both directions": (last_output, {"bidirectional": True}),
    "without biases": (last_output, {"bias": False}),
    "changed in place": (changed_in_place, {}),
    "states of an encoder": (states_of_an_encoder, {}),
    "called twice": (called_twice, {}),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in USES])
def test_lstm_equals_autograd_at_every_length_with_one_plan(name: str) -> None:
    torch.manual_seed(0)
    use, options = USES[name]
    model = Reader(use, **options).double().eval()
    for samples, steps in ((5, 7), (5, 7), (3, 4), (1, 9)):
        x = torch.randn(samples, steps, 5, dtype=torch.float64)
        found = lgm.gradient_statistics(model, x, ["pseudo_label", "uniform"], per_parameter=True)
        expected = lgm.gradient_statistics(
            model, x, ["pseudo_label", "uniform"], per_parameter=True, engine="reference"
        )
        for one, other in zip(found, expected, strict=True):
            for key, value in other.moments.items():
                torch.testing.assert_close(one.moments[key], value, rtol=1e-9, atol=1e-12)
    (strategies,) = _STRATEGIES[model].values()
    assert len(strategies) == 1 and strategies[0].sizes is not None


def test_lstm_with_normalised_recurrent_weights() -> None:
    torch.manual_seed(0)
    model = Reader(last_output).double().eval()
    parametrizations.weight_norm(model.layers, "weight_hh_l1")
    x = torch.randn(4, 5, 5, dtype=torch.float64)
    found = lgm.gradient_statistics(model, x, "uniform", per_parameter=True).norm(2)
    expected = lgm.gradient_statistics(model, x, "uniform", per_parameter=True, engine="reference").norm(2)
    torch.testing.assert_close(found, expected)


def test_a_probe_traces_a_direction_as_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the time that a plan takes does not grow with the number of time steps."""
    counts: list[int] = []

    class Counted(DependenceTrace):
        def __exit__(self, *error: object) -> None:
            names = [operation.name for operation in self.operations]
            counts.append(len(names) - names.count("detach"))  # torch 2.8 repeats those of stored tensors
            super().__exit__(*error)

    monkeypatch.setattr(probe, "DependenceTrace", Counted)
    for length in (3, 30):
        torch.manual_seed(0)
        net = Reader(last_output).double().eval()
        lgm.gradient_statistics(net, torch.randn(7, length, 5).double(), "pseudo_label")
        (strategy,) = next(iter(_STRATEGIES[net].values()))
        assert strategy.sizes is not None and strategy.alone == 0
    assert len(counts) == 4 and len(set(counts)) == 1


def test_samples_along_the_time_axis_are_refused() -> None:
    torch.manual_seed(0)
    net = Reader(lambda net, x: net.layers(x.transpose(0, 1))[0][0]).double().eval()
    with pytest.raises(CoupledSamplesError):
        lgm.gradient_statistics(net, torch.randn(7, 1, 5).double(), "pseudo_label")
