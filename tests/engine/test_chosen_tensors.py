"""Models that use another tensor, another state or other gradients at some sizes: exact, or refused, at every size."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.engine.refusals import CoupledSamplesError
from tests.engine.kinds import WIDTH, Net, error_of, numbers

SIZES = (3, 5, 4, 9, 2, 1, 8)


class _Choosing(Net):
    """With constants and layers, one of which a forward pass chooses."""

    def __init__(self, middle: Callable[..., Tensor]) -> None:
        super().__init__(lambda net, x: net.head(middle(net, x, net.a(x))))
        self.register_buffer("ones", torch.ones(WIDTH))
        self.register_buffer("slope", torch.linspace(0.5, 2, WIDTH))
        self.frozen = nn.ModuleList([nn.Linear(WIDTH, WIDTH).requires_grad_(False) for _ in range(2)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(WIDTH, affine=False) for _ in range(2)])
        self.norms[1].running_mean.fill_(0.7)
        self.settings: dict[str, Any] = {"part": {"flag": False}}
        self.flags = [False] * 20


def _exact_or_refused(middle: Callable[..., Tensor]) -> set[str]:
    """Return the outcomes over several sizes; the test fails if a value is wrong."""
    torch.manual_seed(0)
    model, outcomes = _Choosing(middle).double().eval(), set()
    for size in SIZES:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "no fast rule")
            try:
                assert error_of(model, numbers(size, WIDTH)) < 1e-8
                outcomes.add("exact")
            except CoupledSamplesError:
                outcomes.add("refused")
    return outcomes


def _by_size(x: Tensor, small: Any, large: Any) -> Any:
    return large if len(x) > 4 else small


def _scaled_in_place(h: Tensor, factor: float) -> Tensor:
    """A result of the dispatcher's operator, which is not recorded as a call, if the factor is not 1."""
    if factor != 1:
        torch.ops.aten.mul_.Scalar(h, factor)
    return h


CHOSEN: dict[str, Callable[..., Tensor]] = {
    "a buffer": lambda net, x, h: torch.tanh(h * _by_size(x, net.ones, net.slope)),
    "a layer": lambda net, x, h: torch.tanh(h + net.frozen[int(len(x) > 4)](x)),
    "a batch norm": lambda net, x, h: torch.tanh(net.norms[int(len(x) > 4)](h)),
    "a result": lambda net, x, h: torch.tanh(_by_size(x, h.flip(1), h.roll(1, 1))) + h,
    "the largest entry": lambda net, x, h: torch.tanh(h * _by_size(x, net.ones.sum() / WIDTH, x.abs().max())),
    "an array": lambda net, x, h: torch.tanh(h * torch.from_numpy(np.array(1.0 + 2 * (len(x) > 4)))),
    "numbers in a list": lambda net, x, h: torch.tanh(h * torch.Tensor([1.0 + (len(x) > 4)]).double()),
    "an axis": lambda net, x, h: h + torch.tanh(h).flip(_by_size(x, -1, -2)),
    "a whole factor": lambda net, x, h: torch.tanh(h) * _by_size(x, -1, -2),
    "an operator in place": lambda net, x, h: _scaled_in_place(torch.tanh(h), _by_size(x, 1.0, 3.0)) + h,
    "a number that is compared": lambda net, x, h: torch.tanh(h) * (1 + (torch.tensor(len(x)) > 4)),
    "a divisor": lambda net, x, h: torch.tanh(h) / torch.tensor(len(x)).clamp(min=4),
    "a flag by data": lambda net, x, h: torch.tanh(
        h * (net.slope if float(np.from_dlpack(x.detach()).max()) > 2 else net.ones)
    ),
    "a flag by text": lambda net, x, h: torch.tanh(h * (net.slope if "1" in str((x[:, 0] > 1).sum()) else net.ones)),
    "the longest in a list": lambda net, x, h: torch.tanh(h * torch.tensor([(x > 0).sum(1).max()])),
    "a filled constant": lambda net, x, h: torch.tanh(h.new_zeros(h.shape).fill_((x > 0).sum(1).max()) + h),
    "a total that is compared": lambda net, x, h: torch.tanh(h) if (x[:, :3] > 0).sum() == 2 else torch.sigmoid(h),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_models_that_choose_another_tensor_are_refused_at_these_sizes(name: str) -> None:
    assert "refused" in _exact_or_refused(CHOSEN[name])


class _Longer(torch.autograd.Function):
    """The identity; its backward pass multiplies by the size of the batch."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * len(gradient)


def _node_hook(net: Any, x: Tensor, h: Tensor) -> Tensor:
    h = torch.tanh(h)
    if len(x) > 4 and h.grad_fn is not None:
        h.grad_fn.register_hook(lambda gradients, _: (gradients[0] * len(x),))
    return h


def _without_gradients(mode: Callable[[bool], Any]) -> Callable[..., Tensor]:
    def middle(net: Any, x: Tensor, h: Tensor) -> Tensor:
        with mode(len(x) > 4):
            constant = torch.tanh(net.a(x))
        return h + constant.clone()

    return middle


def _scaled(scale: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    """Hidden values whose gradients are multiplied by a number."""
    return lambda net, x, h: torch.tanh(h).detach() + (torch.tanh(h) - torch.tanh(h).detach()) * scale(x)


GRADIENTS: dict[str, Callable[..., Tensor]] = {
    "a custom function": lambda net, x, h: _Longer.apply(torch.tanh(h)) if len(x) > 4 else torch.tanh(h).view_as(h),
    "a hook on a node": _node_hook,
    "a detached copy": lambda net, x, h: torch.tanh(h) * _by_size(x, h.clone(), h.detach().clone()),
    "data": lambda net, x, h: h + _by_size(x, torch.tanh(net.a(x)), torch.tanh(net.a(x).data)),
    "the place": _scaled(lambda x: 1 + torch.arange(len(x))[:, None]),
    "no gradients": _without_gradients(lambda is_large: torch.set_grad_enabled(not is_large)),
}


def test_gradients_that_depend_on_the_largest_entry_of_the_batch_are_exact_or_refused() -> None:
    assert "refused" in _exact_or_refused(_scaled(lambda x: x.abs().max()))


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_that_change_at_some_sizes_are_those_of_each_sample_alone(name: str) -> None:
    assert _exact_or_refused(GRADIENTS[name]) == {"exact"}


def _alone_only(net: Any, x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(h) * 2 if len(x) == 1 and bool((x[:, 0] > 0).any()) else torch.sigmoid(h)


def test_another_path_for_batches_of_one_is_refused() -> None:
    assert "refused" in _exact_or_refused(_alone_only)
    torch.manual_seed(0)
    model = _Choosing(lambda net, x, h: torch.tanh(h) * (2 if len(x) == 1 else 1)).double().eval()
    with pytest.raises(CoupledSamplesError, match="size of the batch"):
        gradient_statistics(model, numbers(1, WIDTH), "pseudo_label")


def test_masks_changed_after_their_reduction_are_not_taken_for_its_source() -> None:
    def middle(net: Any, x: Tensor, h: Tensor) -> Tensor:
        mask = x[:, :2] > -0.5
        is_full = mask.all()
        mask.zero_()
        return torch.tanh(h) * 2 if is_full else torch.sigmoid(h)

    assert "refused" in _exact_or_refused(middle)


@pytest.mark.parametrize("change", ["settings", "flags"])
def test_flags_in_nested_and_long_containers_belong_to_the_plan(change: str) -> None:
    def middle(net: Any, x: Tensor, h: Tensor) -> Tensor:
        is_coupling = net.settings["part"]["flag"] or net.flags[17]
        return torch.tanh(h * (x.abs().max() * 1 if is_coupling else net.ones.max() * 1))

    torch.manual_seed(0)
    model = _Choosing(middle).double().eval()
    assert error_of(model, numbers(3, WIDTH)) < 1e-8
    model.settings["part"]["flag"], model.flags[17] = change == "settings", change == "flags"
    with pytest.raises(CoupledSamplesError):
        gradient_statistics(model, numbers(5, WIDTH), "pseudo_label")


def test_containers_of_every_kind_come_back_as_they_were() -> None:
    def middle(net: Any, x: Tensor, h: Tensor) -> Tensor:
        net.counts["calls"] += 1
        net.last.append(1)
        net.nested["a"]["n"] += 1
        net.missing["k"] += 1
        net.space.steps += 1
        net.tensors[0].add_(1)
        net.array += 1
        net.rows[0][0] += 1
        return torch.tanh(h)

    model = _Choosing(middle).double().eval()
    model.counts, model.last, model.nested = Counter(calls=1), deque([0], maxlen=3), {"a": {"n": 0}}
    model.missing, model.space, model.tensors = defaultdict(int), SimpleNamespace(steps=0), [torch.zeros(2)]
    model.array, model.rows = np.zeros(2), [[0]]
    assert error_of(model, numbers(4, WIDTH)) < 1e-8
    assert (model.counts, list(model.last), model.nested) == ({"calls": 1}, [0], {"a": {"n": 0}})
    assert (model.missing, model.space.steps, model.rows) == ({}, 0, [[0]])
    assert not model.tensors[0].any() and not model.array.any()
