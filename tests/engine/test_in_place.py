"""On large known paths ReLUs and sums are written into the memory of a layer's output; a model that uses this output gets it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.engine.passes import path_record, strategy
from lightning_gradmetrics.engine.passes.large_path import LargePass
from tests.engine.cases import worst_difference
from tests.engine.known_paths import paths_of

SEEN: dict[str, Any] = {}
"""What a model leaves outside of itself."""


class Net(nn.Module):
    """A residual block; ``end`` computes its output from the second norm's output and the shortcut."""

    def __init__(self, end: Callable[[Tensor, Tensor], Tensor], norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norms, self.head, self.end = nn.ModuleList([norm(8), norm(8)]), nn.Linear(8, 3), end
        for each in self.norms:
            each.weight.data.normal_()  # type: ignore[union-attr, operator]
            each.bias.data.normal_()  # type: ignore[union-attr, operator]

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.relu(self.norms[0](self.first(x)))
        z = self.norms[1](self.second(shortcut))
        logits: Tensor = self.head(self.end(z, shortcut).flatten(2).amax(2))
        return logits


def _usual(z: Tensor, shortcut: Tensor) -> Tensor:
    return (z + shortcut).relu()


def _other_side(z: Tensor, shortcut: Tensor) -> Tensor:
    return torch.relu(torch.add(shortcut, z))


def _twice(z: Tensor, shortcut: Tensor) -> Tensor:
    return (z + z).relu() + z


def _two_uses_of_the_sum(z: Tensor, shortcut: Tensor) -> Tensor:
    total = z + shortcut
    return total.relu() * total


def _scaled(z: Tensor, shortcut: Tensor) -> Tensor:
    return torch.add(z, shortcut, alpha=2).relu()


def _wider(z: Tensor, shortcut: Tensor) -> Tensor:
    """The sum has another shape than the output of the norm."""
    return (z + torch.stack([shortcut.flatten(2).mean(2)] * 2)[..., None, None]).sum(0).relu()


def _narrower(z: Tensor, shortcut: Tensor) -> Tensor:
    return (z + shortcut[..., :1]).relu()


def _saved(z: Tensor, shortcut: Tensor) -> Tensor:
    """The backward pass of the first function reads its result, which the sum must not change."""
    return (z.sigmoid() + shortcut).relu()


def _after_relu(z: Tensor, shortcut: Tensor) -> Tensor:
    """The backward pass of a ReLU reads its result too."""
    return z.relu() + shortcut


def _after_relu_of_the_sum(z: Tensor, shortcut: Tensor) -> Tensor:
    return (z + shortcut).relu().relu()


def _in_place_already(z: Tensor, shortcut: Tensor) -> Tensor:
    z += shortcut
    return F.relu(z, inplace=True)


ENDS = {
    _usual: 3,
    _other_side: 3,
    _twice: 1,
    _two_uses_of_the_sum: 2,
    _scaled: 1,
    _narrower: 3,
    _wider: 1,
    _saved: 1,
    _after_relu: 2,
    _after_relu_of_the_sum: 3,
    _in_place_already: 1,
}
"""The number of calls that each model with this end runs in place."""


@pytest.fixture(autouse=True)
def _small_batches_count_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_record, "MOST_BYTES", 0)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the functions that were run in place."""
    names: list[str] = []
    run = LargePass._in_place

    def noted(self: LargePass, known: Any, *rest: Any) -> Tensor:
        result = run(self, known, *rest)
        names.append(known.function.__name__)
        return result

    monkeypatch.setattr(LargePass, "_in_place", noted)
    return names


def net(end: Callable[[Tensor, Tensor], Tensor], norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    return Net(end, norm).double().eval()


def _groups(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


def compare(model: nn.Module) -> None:
    """Compare the statistics of two objectives with those of the slow reference."""
    x, objectives = torch.randn(5, 3, 6, 6, dtype=torch.float64), ["pseudo_label", "uniform"]
    found = gradient_statistics(model, x, objectives, per_parameter=True)
    left = SEEN.pop("left", torch.full((), -1.0))
    assert not left.is_meta
    assert float(left.detach().min()) < 0  # not the output of a ReLU
    expected = gradient_statistics(model, x, objectives, per_parameter=True, engine="reference")
    for one, other in zip(found, expected, strict=True):
        assert worst_difference(one, other) < 1e-9


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, _groups])
@pytest.mark.parametrize("end", ENDS)
def test_results_are_those_of_the_reference(end: Any, norm: Any, written: list[str]) -> None:
    model = net(end, norm)
    for _ in range(3):
        compare(model)
    assert len(written) == ENDS[end]


@pytest.mark.parametrize("end", [_usual, _other_side, _twice, _after_relu_of_the_sum])
def test_outputs_of_folded_norms_are_changed_in_place(
    end: Any, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of a folded norm's weight is not read from its output after the sum is written there."""
    monkeypatch.setattr(strategy, "MOST_BYTES", 0)
    model = net(end)
    for _ in range(4):
        compare(model)
    (path,) = paths_of(model)
    assert written and path.is_in_place
    assert sum(call.is_norm for call in path.calls) == 2


def _stores(z: Tensor) -> None:
    SEEN["left"] = z


def _computes(z: Tensor) -> None:
    SEEN["left"] = z * 2


def _is_stored_as_an_alias(z: Tensor) -> None:
    SEEN["left"] = z.detach()


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("use", [_stores, _computes, _is_stored_as_an_alias])
def test_a_model_that_uses_an_output_gets_it(use: Callable[[Tensor], None], is_late: bool, written: list[str]) -> None:
    """After the sum that replaces it, in every batch or in later ones only; the calls are then recorded again."""
    state = {"on": not is_late}

    def end(z: Tensor, shortcut: Tensor) -> Tensor:
        result = (z + shortcut).relu()
        if state["on"]:
            use(z)
        return result

    model = net(end)
    for number in range(10):
        state["on"] = state["on"] or number == 4
        compare(model)
    assert written.count("add") <= 3  # no more once the model has used an output


class _Leaky(TorchFunctionMode):
    """A mode of the caller that replaces ReLUs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.relu, torch.relu, Tensor.relu):
            return F.leaky_relu(args[0], 0.3)
        return func(*args, **(kwargs or {}))


def test_a_mode_of_the_caller_gets_all_calls(written: list[str]) -> None:
    model = net(_usual)
    for _ in range(4):
        with _Leaky():
            compare(model)
    assert not written
    for _ in range(4):
        compare(model)
    assert written
    assert any(path.is_in_place for path in paths_of(model))
