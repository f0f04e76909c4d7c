"""Models that keep samples apart at the sizes of the probe, but perhaps not at others: exact, or refused, at every size."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradmetrics.engine import auto, gradient_statistics
from lightning_gradmetrics.engine.planning.verification import make_strategy
from lightning_gradmetrics.engine.refusals import CoupledSamplesError
from lightning_gradmetrics.engine.tracing.size_record import SizeRecord
from tests.engine.kinds import WIDTH, Net, error_of, numbers


class _Table(Net):
    """With constants, some of which a model may look up by the size of the batch."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__(function)
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("table", torch.linspace(1, 3, 64))
        self.register_buffer("rows", torch.randn(64, WIDTH))
        self.register_buffer("order", torch.cat([torch.arange(4), torch.tensor([5, 4]), torch.arange(6, 64)]))


def _hidden(net: Any, x: Tensor) -> Tensor:
    return torch.tanh(net.a(x))


def _added(change: Callable[[Any, Tensor, int], Tensor]) -> Callable[..., Tensor]:
    """A head on hidden values, changed by a function of them and of the batch size."""
    return lambda net, x: net.head(_hidden(net, x) + change(net, _hidden(net, x), len(x)))


def _scaled_gradient(scale: Callable[[Any, Tensor], Any]) -> Callable[..., Tensor]:
    """Logits as usual, whose gradient is multiplied by a number."""

    def forward(net: Any, x: Tensor) -> Tensor:
        logits = net.head(_hidden(net, x))
        return logits.detach() + (logits - logits.detach()) * scale(net, x)

    return forward


def _in_groups(net: Any, h: Tensor, size: int) -> Tensor:
    count = 4 if size % 4 == 0 else 1
    groups = h.view(size // count, count, -1)
    return groups.mean(1, keepdim=True).expand_as(groups).reshape(size, -1)


def _swapped_by_a_list(net: Any, h: Tensor, size: int) -> Tensor:
    order = list(range(size))
    if size > 3:
        order[-1], order[-2] = order[-2], order[-1]
    return h[torch.LongTensor(order)]


def _written_and_mixed(net: Any, h: Tensor, size: int) -> Tensor:
    rows = torch.zeros_like(h)
    rows[:, :3] = h[:, :3]
    return -rows[0]


def _written_row(row: slice) -> Callable[[Any, Tensor, int], Tensor]:
    """A constant that is one for some places of the batch only."""

    def change(net: Any, h: Tensor, size: int) -> Tensor:
        rows = torch.zeros(size, 1, dtype=h.dtype)
        rows[row] = 1
        return rows * h

    return change


def _multiplied_by_heads(net: Any, h: Tensor, size: int) -> Tensor:
    """The rows of a table are ordered by sample, those of the features by head."""
    rows = net.rows[:2, :3].expand(size, 2, 3).reshape(2 * size, 3)
    by_head = h[:, :6].view(size, 2, 3).transpose(0, 1).reshape(2 * size, 3) * rows
    return F.pad(by_head.view(2, size, 3).transpose(0, 1).reshape(size, 6), (0, WIDTH - 6))


def _halved(net: Any, x: Tensor) -> Tensor:
    h, half = _hidden(net, x), len(x) // 2
    return net.head(torch.cat([h[:half], 2 * h[half:]]))


def _centred_if_large(x: Tensor) -> Tensor:
    if x.shape[0] > 4:
        return x - x.mean(0)
    return x


COUPLED: dict[str, Callable[..., Tensor]] = {
    "groups of four": _added(_in_groups),
    "a shifted range": _added(lambda net, h, n: h[torch.arange(n // 4, n + n // 4) % n]),
    "an order in a buffer": _added(lambda net, h, n: h[net.order[:n]]),
    "an order in a list": _added(_swapped_by_a_list),
    "rolled by a quarter": _added(lambda net, h, n: h.roll(n // 4, 0)),
    "a constant for each place": _added(lambda net, h, n: net.rows[:n]),
    "a constant for each size": _added(lambda net, h, n: h * net.table[n]),
    "as many columns as samples": _added(lambda net, h, n: h[:, :n].sum(1, keepdim=True)),
    "the sum of a constant over the batch": _added(lambda net, h, n: (torch.zeros_like(h) + net.scale).sum(0)),
    "a product of constants over the batch": _added(lambda net, h, n: h * (h.new_ones(1, n) @ h.new_ones(n, 1))),
    "a row written and read by others": _added(_written_and_mixed),
    "the first half of the batch": _halved,
    "the third sample": _added(_written_row(slice(2, 3))),
    "all samples from the fourth on": _added(_written_row(slice(3, None))),
    "heads in another order": _added(_multiplied_by_heads),
    "a scripted function": lambda net, x: net.head(torch.jit.script(_centred_if_large)(_hidden(net, x))),
}
"""Models whose samples depend on each other, on their place or on their number, at some sizes."""


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", COUPLED)
def test_models_that_depend_on_the_size_are_refused(name: str) -> None:
    torch.manual_seed(0)
    model = _Table(COUPLED[name]).double().eval()
    with pytest.raises(CoupledSamplesError):
        for size in (3, 4, 8):
            batch = numbers(size, WIDTH)
            assert error_of(model, batch) < 1e-8


def _by_batch_of_products(net: Any, h: Tensor, size: int) -> Tensor:
    rows = h.view(size, WIDTH, 1)
    return torch.baddbmm(h.view(size, 1, WIDTH), rows, rows.transpose(1, 2)).sum(1)


def _masked_columns(net: Any, h: Tensor, size: int) -> Tensor:
    mask = torch.ones(size, WIDTH, dtype=h.dtype)
    mask[:, :2] = 0
    return h * mask


def _in_new_memory(net: Any, h: Tensor, size: int) -> Tensor:
    rows = h.new_empty(size, 2, WIDTH)
    rows[:, 0], rows[:, 1] = h, h.square()
    return rows.sum(1)


PROVEN: dict[str, Callable[..., Tensor]] = {
    "a table repeated by sample": _added(
        lambda net, h, n: (h[:, :6].reshape(2 * n, 3) * net.rows[:2, :3].repeat(n, 1)).view(n, 6).sum(1, True)
    ),
    "features repeated": _added(lambda net, h, n: h[:, None].repeat(1, 3, 1).sum(1)),
    "a Fourier transform of the features": _added(lambda net, h, n: torch.fft.fft(h).real),
    "a product of batches and a summand": _added(_by_batch_of_products),
    "a constant mask of columns": _added(_masked_columns),
    "memory without values": _added(_in_new_memory),
}
"""Models of which every operation is known to keep the samples apart."""


@pytest.mark.parametrize("name", PROVEN)
def test_constants_for_each_sample_and_batches_of_products_are_proven(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = []
    monkeypatch.setattr(auto, "make_strategy", lambda *args: planned.append(make_strategy(*args)) or planned[-1])
    torch.manual_seed(0)
    model = _Table(PROVEN[name]).double().eval()
    for size in (3, 5, 8):
        assert error_of(model, numbers(size, WIDTH)) < 1e-8
    assert [strategy.sizes is not None for strategy in planned] == [True]


SCALES: dict[str, Callable[[Any, Tensor], Any]] = {
    "divided by the size": lambda net, x: 1 / len(x),
    "a sum of ones": lambda net, x: torch.ones(len(x)).double().sum(),
    "a filled tensor": lambda net, x: torch.full((1,), len(x)).double(),
    "a parameter times the size": lambda net, x: net.temperature.detach() * len(x),
    "looked up": lambda net, x: net.table[len(x)],
    "an array": lambda net, x: torch.from_numpy(np.ones(1) * len(x)),
    "large batches only": lambda net, x: 0.5 if len(x) > 4 else 1.0,
}


@pytest.mark.parametrize("name", SCALES)
def test_gradients_that_depend_on_the_size_are_those_of_each_sample_alone(name: str) -> None:
    torch.manual_seed(0)
    model = _Table(_scaled_gradient(SCALES[name])).double().eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no fast rule")
        for size in (3, 5, 8):
            assert error_of(model, numbers(size, WIDTH)) < 1e-8


def _view_for_one_step(net: Any, x: Tensor) -> Tensor:
    h = _hidden(net, x)
    return net.head(h.mean(1) + h.reshape(h.shape[1], len(h), -1).mean(0))


def _centred_if_long(net: Any, x: Tensor) -> Tensor:
    h = _hidden(net, x)
    return net.head(h.mean(1) - (h.mean((0, 1)) if x.shape[1] > 6 else 0))


@pytest.mark.parametrize("forward", [_view_for_one_step, _centred_if_long])
def test_models_that_couple_at_some_lengths_are_refused(forward: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = Net(forward).double()
    assert error_of(model, numbers(3, 1, WIDTH)) < 1e-8
    with pytest.raises(CoupledSamplesError):
        gradient_statistics(model, numbers(4, 8, WIDTH), "pseudo_label")


def _regrouped_at(lengths: tuple[int, ...], least: int) -> Callable[..., Tensor]:
    """The average over time; at some lengths, rows of large batches are joined in pairs of steps, which mixes the samples."""

    def forward(net: Any, x: Tensor) -> Tensor:
        h = _hidden(net, x).transpose(0, 1).contiguous()
        is_joined = x.shape[1] in lengths and len(x) >= least
        steps = len(h) // 2 if is_joined else len(h)
        return net.head(h.view(steps, len(x), -1).mean(0)[:, :WIDTH])

    return forward


@pytest.mark.parametrize("least", [1, 4])
def test_lengths_with_other_sizes_than_several_others_are_checked(least: int) -> None:
    torch.manual_seed(0)
    model = Net(_regrouped_at((12,), least)).double()
    for shape in ((3, 5), (4, 8), (5, 6), (4, 7), (3, 10)):
        assert error_of(model, numbers(*shape, WIDTH)) < 1e-8
    with pytest.raises(CoupledSamplesError):
        gradient_statistics(model, numbers(4, 12, WIDTH), "pseudo_label")


@pytest.mark.parametrize(("area", "is_linear"), [(lambda length: 5 * length, True), (lambda length: length**2, False)])
def test_sizes_that_are_no_linear_function_of_a_length_need_a_sample_alone(
    area: Callable[[int], int], is_linear: bool
) -> None:
    def outline(length: int, samples: int) -> Any:
        return SimpleNamespace(path=1, sizes=[area(length) * samples])

    record = SizeRecord(1, (True,), {((5,),): (area(5),)}, [(5, area(5))])
    for length in (6, 7):
        assert not record.continues(outline(length, 4), 4, ((length,),))
        assert record.learn(outline(length, 4), 4, outline(length, 1), ((length,),))
    assert record.continues(outline(8, 4), 4, ((8,),)) == is_linear


# -- numbers that Python reads ----------------------------------------------------------------------------------------


def _to_longest(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    return net.head(_hidden(net, x[:, : int(lengths.max())]).mean(1))


def _to_longest_in_a_list(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    return net.head(_hidden(net, x[:, : max(lengths.tolist())]).mean(1))


def _without_padding(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    longest = int(lengths.max())
    real = (torch.arange(longest) < lengths[:, None]).to(x.dtype)[..., None]
    return net.head((_hidden(net, x[:, :longest]) * real).sum(1) / real.sum(1))


def _by_mask(question: Callable[[Tensor], Any], factor: float) -> Callable[..., Tensor]:
    def forward(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1]) < lengths[:, None]
        if question(mask):
            return net.head(_hidden(net, x).mean(1))
        return net.head((_hidden(net, x) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) * factor)

    return forward


QUESTIONS: dict[str, Callable[[Tensor], Any]] = {
    "all": lambda mask: mask.all(),
    "any": lambda mask: not (~mask).any(),
    "sum": lambda mask: mask.sum() == mask.numel(),
    "in": lambda mask: False not in mask,
}


def _texts(*lengths: int) -> tuple[Tensor, Tensor]:
    return numbers(len(lengths), 6, WIDTH), torch.tensor(lengths)


@pytest.mark.parametrize("forward", [_to_longest, _to_longest_in_a_list])
def test_one_short_text_among_many_equal_ones_is_found(forward: Callable[..., Tensor]) -> None:
    """Comparing three samples of the batch would rarely reveal it."""
    torch.manual_seed(0)
    model = Net(forward).double()
    gradient_statistics(model, _texts(4, 4, 4), "pseudo_label")
    with pytest.raises(CoupledSamplesError):
        gradient_statistics(model, _texts(*[4] * 14, 3, 4), "pseudo_label")


@pytest.mark.parametrize("question", QUESTIONS)
def test_one_text_without_padding_among_padded_ones_is_found(question: str) -> None:
    torch.manual_seed(0)
    model = Net(_by_mask(QUESTIONS[question], 1.1)).double()
    gradient_statistics(model, _texts(4, 4, 5), "pseudo_label")
    with pytest.raises(CoupledSamplesError):
        gradient_statistics(model, _texts(*[4] * 10, 6, 3), "pseudo_label")


@pytest.mark.parametrize("question", QUESTIONS)
def test_questions_about_padding_are_exact_where_they_make_no_difference(question: str) -> None:
    torch.manual_seed(0)
    model = Net(_by_mask(QUESTIONS[question], 1.0)).double()
    for lengths in ((6, 6, 6), (4, 6, 5, 3), (6, 6, 6, 6, 6), (2, 6)):
        assert error_of(model, _texts(*lengths)) < 1e-8


def test_a_plan_is_verified_by_a_sample_that_reads_what_the_batch_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """All samples but one would alone take another path, to which the proof does not apply."""
    planned = []
    monkeypatch.setattr(auto, "make_strategy", lambda *args: planned.append(make_strategy(*args)) or planned[-1])
    torch.manual_seed(0)
    model = Net(_by_mask(QUESTIONS["all"], 1.0)).double()
    gradient_statistics(model, _texts(5, *[6] * 15), "pseudo_label")
    assert len(planned) == 1 and planned[0].sizes is not None and planned[0].verified


def _without_gradient(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    """Samples without padding have no gradient of the first layer if they are alone, but the same logits."""
    mask = torch.arange(x.shape[1]) < lengths[:, None]
    h = _hidden(net, x).detach() if mask.all() else _hidden(net, x)
    return net.head((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


@pytest.mark.parametrize("is_first", [True, False])
def test_gradients_that_one_text_without_padding_would_not_have_alone_are_refused(is_first: bool) -> None:
    torch.manual_seed(0)
    model = Net(_without_gradient).double()
    if not is_first:
        assert error_of(model, _texts(4, 4, 5, 5, 4)) < 1e-8
    with pytest.raises(CoupledSamplesError, match="backward pass"):
        gradient_statistics(model, _texts(*[4] * 14, 6, 3), "pseudo_label")


def _two_reads(net: Any, x: Tensor) -> Tensor:
    """The first value that Python reads makes no difference; if the second one is true, the first layer has no gradient."""
    if (x[:, 0] > 0).all():
        pass
    h = _hidden(net, x)
    return net.head(h.detach() if (x[:, 1] > 1).all() else h)


def test_the_gradients_of_every_path_of_samples_alone_are_compared() -> None:
    """Samples of the first batches take one other path alone, a later one takes another."""
    torch.manual_seed(0)
    model, x = Net(_two_reads).double(), numbers(6, WIDTH)
    x[:, 0], x[:, 1] = torch.tensor([1.0, -1, -1, 1, -1, 1]), 0.0
    for _ in range(2):
        assert error_of(model, x) < 1e-8
    x[4, 1] = 2.0
    with pytest.raises(CoupledSamplesError, match="backward pass"):
        gradient_statistics(model, x, "pseudo_label")


def test_lengths_that_make_no_difference_are_exact() -> None:
    torch.manual_seed(0)
    model = Net(_without_padding).double()
    for lengths in ((4, 4, 4), (4, 2, 4, 3), (5, 2, 1, 3, 5)):
        assert error_of(model, _texts(*lengths)) < 1e-8


class _Shared(torch.autograd.Function):
    """The identity; its backward pass divides by the size of the batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size = len(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / ctx.size


def _hooked(net: Any, x: Tensor) -> Tensor:
    h = _hidden(net, x)
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient - gradient.mean(0) if len(gradient) > 3 else gradient)
    return net.head(h)


@pytest.mark.parametrize("forward", [lambda net, x: net.head(_Shared.apply(_hidden(net, x))), _hooked])
def test_backward_passes_that_depend_on_the_size(forward: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = Net(forward).double()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no fast rule")
        for size in (3, 5, 8):
            assert error_of(model, numbers(size, WIDTH)) < 1e-8


def test_constants_that_grow_with_the_batch_are_exact() -> None:
    torch.manual_seed(0)
    model = Net(lambda net, x: net.head(_hidden(net, x) * (torch.ones_like(x) * net.scale) + F.relu(x))).double()
    for size in (3, 8, 1):
        assert error_of(model, numbers(size, WIDTH)) < 1e-8


def test_group_norm_needs_no_check_of_each_batch() -> None:
    """Its operator takes the length of the first axis, which grows with the batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(12, 3)).eval()
    gradient_statistics(model, torch.randn(4, 2, 5), "pseudo_label")
    [[strategy]] = auto._STRATEGIES[model].values()
    assert strategy.alone == 0
