"""Couplings, hooks and modes that no earlier batch shows: they must not change a later batch of a known size silently."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import lightning_gradmetrics as lgm
from lightning_gradmetrics.compat.gradient_metrics import GradientMetricCollector, metrics

D, SIZE = 6, 16


@torch.library.custom_op("gradmetrics_tests::after_large", mutates_args=())
def _after_large(hidden: Tensor, x: Tensor) -> Tensor:
    """Double the sample after one with a large number."""
    return hidden * (1 + (x.roll(1, 0)[:, :1] > 6))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


_after_large.register_autograd(
    lambda ctx, gradient: (gradient * (1 + (ctx.saved_tensors[0].roll(1, 0)[:, :1] > 6)), None), setup_context=_save
)


def _mean_gate(x: Tensor) -> Tensor:
    """A gate that one sample of a batch alone opens, but not in the batch."""
    return 1 + F.relu(x[:, :1].mean(0) - 6)


def _in_thread(function: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


class _GatedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient * _mean_gate(ctx.saved_tensors[0]), None


class _NumpyBackward(_GatedBackward):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        gate = _mean_gate(ctx.saved_tensors[0]).numpy()
        return torch.from_numpy(gradient.numpy() * gate), None


class _Gated(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inner, self.head = kind, nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        return self.head(getattr(self, self.kind)(x, hidden))

    def neighbours(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The sample before opens a gate."""
        return hidden * (1 + F.relu(F.pad(x, (0, 0, 1, -1))[:, :1] - 6))

    def cumulated(self, x: Tensor, hidden: Tensor) -> Tensor:
        return hidden + F.relu(x[:, :1] - 6).cumsum(0)

    def first_features(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Two and three samples take all features of each, one sample alone takes half of them."""
        return hidden + F.relu(x[:, :1] - 6) * hidden[:, : D // 2 * len(x)].sum(1, keepdim=True)

    def regrouped(self, x: Tensor, hidden: Tensor) -> Tensor:
        """A reshape takes features of several samples for those of one."""
        return hidden + F.relu(x[:, :1] - 6) * hidden.t().reshape(len(x), -1)

    def unknown(self, x: Tensor, hidden: Tensor) -> Tensor:
        """An operation of another library couples the samples."""
        return _after_large(hidden, x)

    def other_thread(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Another thread, whose operations are not traced, computes a gate that opens for a sample alone."""
        return hidden * _in_thread(lambda: _mean_gate(x))

    def other_thread_in_place(self, x: Tensor, hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        _in_thread(lambda: hidden.mul_(_mean_gate(x)))
        return hidden

    def backward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The gate is in the backward pass only."""
        return _GatedBackward.apply(hidden, x)  # type: ignore[no-any-return, no-untyped-call]

    def backward_of_numpy(self, x: Tensor, hidden: Tensor) -> Tensor:
        return _NumpyBackward.apply(hidden, x)  # type: ignore[no-any-return, no-untyped-call]

    def duplicates(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Each sample is averaged with its duplicates."""
        alike = (torch.cdist(x, x) < 1e-2).to(x.dtype)
        return alike @ hidden / alike.sum(1, keepdim=True)


_KINDS = ("neighbours", "cumulated", "duplicates", "unknown", "first_features", "regrouped", "other_thread")


@pytest.mark.filterwarnings("ignore:no fast rule")
@pytest.mark.parametrize("kind", [*_KINDS, "other_thread_in_place"])
def test_a_coupling_of_few_samples_that_a_later_batch_shows_is_refused(kind: str) -> None:
    """Its operation is seen on the probe, whose values do not show it."""
    torch.manual_seed(0)
    model = _Gated(kind).double().eval()
    for size in (3, SIZE, SIZE, SIZE):
        lgm.gradient_statistics(model, torch.randn(size, D, dtype=torch.float64), "pseudo_label")
    rare = torch.randn(SIZE, D, dtype=torch.float64)
    rare[11, 0], rare[14] = 9.0, rare[15] + 1e-3
    if kind == "cumulated":
        rare[14, 0] = 9.0
    with pytest.raises(ValueError, match="depend on each other"):
        lgm.gradient_statistics(model, rare, "pseudo_label")


@pytest.mark.filterwarnings("ignore:no fast rule")
@pytest.mark.parametrize("kind", ["backward", "backward_of_numpy"])
def test_code_of_the_user_in_a_backward_pass_gets_one_sample_if_it_may_combine_them(kind: str) -> None:
    model = _Gated(kind).double().eval()
    for size in (3, SIZE, SIZE):
        x = torch.randn(size, D, dtype=torch.float64)
        lgm.gradient_statistics(model, x, "pseudo_label")
    x[11, 0] = 9.0
    found = lgm.gradient_statistics(model, x, "pseudo_label").norm(2)
    expected = lgm.gradient_statistics(model, x, "pseudo_label", engine="reference").norm(2)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:no fast rule", "ignore:.* is not compiled")
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_hook_on_a_parameter_changes_its_statistics(compile: bool) -> None:
    """A hook that is registered after the first batches is not ignored."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3)).double().eval()
    x = torch.randn(5, D, dtype=torch.float64)
    for _ in range(4):
        before = lgm.gradient_statistics(model, x, "pseudo_label", per_parameter=True, compile=compile)
    handle = model[0].weight.register_hook(lambda gradient: 2 * gradient)
    after = lgm.gradient_statistics(model, x, "pseudo_label", per_parameter=True, compile=compile)
    factors = torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert torch.allclose(after.norm(1), factors * before.norm(1))
    handle.remove()
    after = lgm.gradient_statistics(model, x, "pseudo_label", per_parameter=True, compile=compile)
    assert torch.allclose(after.norm(1), before.norm(1))


@pytest.mark.filterwarnings("ignore:.*one backward pass per loss", "ignore:.*hook on a parameter")
def test_a_hook_on_a_parameter_changes_what_the_collector_returns() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3)), torch.randn(5, D)
    collector = GradientMetricCollector(metrics.PNorm(model[0], p=1))
    before = [collector(model(x).logsumexp(1)) for _ in range(2)]
    model[0].weight.register_hook(lambda gradient: 2 * gradient)
    model[0].bias.register_hook(lambda gradient: 2 * gradient)
    torch.testing.assert_close(collector(model(x).logsumexp(1)), 2 * before[1])


class _Doubling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is F.linear else result


@pytest.mark.filterwarnings("ignore:no fast rule")
def test_a_function_mode_of_the_caller_changes_the_statistics() -> None:
    """A plan made without the mode is not used."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3)).double().eval(), torch.randn(5, D).double()
    for _ in range(4):
        lgm.gradient_statistics(model, x, "pseudo_label")
    with _Doubling():
        found = lgm.gradient_statistics(model, x, "pseudo_label")
        expected = lgm.gradient_statistics(model, x, "pseudo_label", engine="reference")
    assert torch.allclose(found.norm(1), expected.norm(1))
