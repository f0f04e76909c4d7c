"""Small models, one for each known cause of wrong per-sample gradients, and their true gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_gradmetrics.engine import gradient_statistics

WIDTH, CLASSES = 6, 3
STATISTICS = ("max", "min", "mean", "l1", "l2")


def numbers(*shape: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64)


def pseudo_label(logits: Tensor) -> Tensor:
    """Cross-entropy to the predicted class."""
    return F.cross_entropy(logits, logits.detach().argmax(1), reduction="none")


def first_rows(inputs: Any, number: int) -> Any:
    """One sample, where every tensor holds the samples on its first axis."""
    if isinstance(inputs, Tensor):
        return inputs[number : number + 1]
    return tuple(first_rows(value, number) for value in inputs)


def only_first(inputs: Any, number: int) -> Any:
    """One sample, where only the first tensor holds the samples."""
    return (inputs[0][number : number + 1], *inputs[1:])


def error_of(
    model: nn.Module,
    inputs: Any,
    objective: Callable[[Tensor], Tensor] = pseudo_label,
    sample: Callable[[Any, int], Any] = first_rows,
) -> float:
    """The largest error of the engine, relative to the largest value of each sample."""
    found = gradient_statistics(model, inputs, objective, per_parameter=True, statistics=STATISTICS)
    expected = []
    for number in range(len(found.max)):
        expected.append(_alone(copy.deepcopy(model), sample(inputs, number), objective))
    values = torch.stack([found.statistic(name) for name in STATISTICS], -1)
    truth = torch.stack(expected)
    return float(((values - truth).abs() / truth.abs().amax((1, 2), keepdim=True).clamp_min(1e-12)).max())


def _alone(model: nn.Module, inputs: Any, objective: Callable[[Tensor], Tensor]) -> Tensor:
    parameters = [parameter.requires_grad_() for parameter in model.parameters()]
    copies = [tensor.clone() for tensor in ((inputs,) if isinstance(inputs, Tensor) else inputs)]
    logits = model(*copies)
    gradients = torch.autograd.grad(objective(logits).sum(), parameters, allow_unused=True)
    rows = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        g = torch.zeros_like(parameter) if gradient is None else gradient
        rows.append(torch.stack([g.max(), g.min(), g.mean(), g.abs().sum(), g.norm()]))
    return torch.stack(rows)


def _nothing(model: nn.Module) -> None:
    """Changes nothing before a batch."""


Batches = Callable[[], list[tuple[Callable[[nn.Module], Any], Any]]]


@dataclass(frozen=True)
class Kind:
    """A model, the batches that it sees in order, and what is changed in the model before each."""

    model: Callable[[], nn.Module]
    batches: Batches
    objective: Callable[[Tensor], Tensor] = pseudo_label
    sample: Callable[[Any, int], Any] = first_rows


class Net(nn.Module):
    """Three layers and a vector, combined by a given function."""

    threshold: float
    settings: dict[str, bool]

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.scale, self.function = nn.Parameter(torch.rand(WIDTH) + 0.5), function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


class Mixture(nn.Module):
    """Tokens go to the expert with the largest gate."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(WIDTH, count), nn.Linear(WIDTH, CLASSES)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        gates = self.gate(tokens).softmax(1)
        largest, chosen = gates.max(1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, rows, largest[rows, None] * expert(tokens[rows]))
        return self.head(torch.tanh(out).reshape_as(x).mean(1))


def _of(function: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    return lambda: Net(function).double().eval()


def _plain(*batches: Any) -> Batches:
    return lambda: [(_nothing, batch() if callable(batch) else batch) for batch in batches]


def _rows(*counts: int) -> Batches:
    return _plain(*(numbers(count, WIDTH) for count in counts))


# -- exact ------------------------------------------------------------------------------------------------------------


def _ranked(net: Net, x: Tensor) -> Tensor:
    order = x.sum(1).argsort()
    return net.head(torch.tanh(net.a(x[order]))[order.argsort()])


def _real_tokens(net: Net, x: Tensor, lengths: Tensor) -> Tensor:
    real = torch.arange(x.shape[1]) < lengths[:, None]
    tokens = torch.zeros_like(x)
    tokens[real] = torch.tanh(net.a(x[real]) * net.scale)
    return net.head(tokens.sum(1))


def _by_list(net: Net, x: Tensor, lengths: Tensor) -> Tensor:
    counts = lengths.tolist()
    tokens = torch.cat([row[:count] for row, count in zip(x, counts, strict=True)])
    return net.head(torch.stack([part.mean(0) for part in torch.tanh(net.a(tokens)).split(counts)]))


def _gated_frames(net: Net, x: Tensor) -> Tensor:
    frames = x.transpose(0, 1)
    hidden = torch.tanh(net.a(frames.flatten(0, 1))).reshape(frames.shape).mean(0)
    return net.head(F.relu(hidden - net.threshold) + x.mean(1))


def _frames() -> nn.Module:
    model = Net(_gated_frames).double()
    model.threshold = 0.0
    return model


def _threshold(value: float) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model, "threshold", value)


def _flagged(net: Net, x: Tensor) -> Tensor:
    steps = x.transpose(0, 1) if net.settings["time_first"] else x
    hidden = torch.tanh(net.a(steps.flatten(0, 1))).reshape(steps.shape)
    return net.head(hidden.mean(0 if net.settings["time_first"] else 1))


def _with_settings() -> nn.Module:
    model = Net(_flagged).double()
    model.settings = {"time_first": False}
    return model


def _time_first(flag: bool) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model, "settings", {"time_first": flag})


def _pieces(net: Net, x: Tensor) -> Tensor:
    return net.head(torch.cat([torch.tanh(net.a(part)) for part in x.split(4)]))


def _padded_to_four(net: Net, x: Tensor) -> Tensor:
    padded = F.pad(x, (0, 0, 0, -len(x) % 4))
    return net.head(torch.tanh(net.a(padded)))[: len(x)]


def _reversed_inside(net: Net, x: Tensor) -> Tensor:
    return net.head(torch.tanh(net.a(x.flip(0)))).flip(0)


def _reversed_if_large(net: Net, x: Tensor) -> Tensor:
    return _reversed_inside(net, x) if len(x) > 4 else net.head(torch.tanh(net.a(x)))


def _first_two_swapped(net: Net, x: Tensor) -> Tensor:
    order = torch.arange(len(x))
    if len(x) > 3:
        order[:2] = torch.tensor([1, 0])
    return net.head(torch.tanh(net.a(x[order])))[order]


def _in_place(net: Net, x: Tensor) -> Tensor:
    x.mul_(2).add_(1)
    return net.head(torch.tanh(net.a(x)))


def _cached(net: Net, x: Tensor) -> Tensor:
    cache = net.__dict__.setdefault("cache", {})
    if "scale" not in cache:
        cache["scale"] = net.scale.exp()
    return net.head(torch.tanh(net.a(x)) * cache["scale"])


def _scripted(x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(x @ weight.t())


def _through_script(net: Net, x: Tensor) -> Tensor:
    return net.head(torch.jit.script(_scripted)(x, [net.a.weight][0]))


def _with_prior(net: Net, x: Tensor, prior: Tensor) -> Tensor:
    return net.head(torch.tanh(net.a(x))) + prior


def _to_prototypes(net: Net, x: Tensor, prototypes: Tensor) -> Tensor:
    return -torch.cdist(torch.tanh(net.a(x)), prototypes)


def _some_rows(net: Net, x: Tensor) -> Tensor:
    hidden = torch.tanh(net.a(x))
    chosen = x[:, 0] > 0
    return net.head(hidden.index_put((chosen.nonzero()[:, 0],), net.b(hidden[chosen])))


class _Scaled(torch.autograd.Function):
    """A product whose backward pass calls no torch function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return gradient * scale, (gradient * x).sum(0)


class _Clipped(torch.autograd.Function):
    """The identity; clips the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-1e-3, 1e-3)


def _custom_behind_a_gate(net: Net, x: Tensor) -> Tensor:
    return net.head(torch.tanh(net.a(x)) + F.relu(_Scaled.apply(x, net.scale) - 5))


def _written_behind_a_gate(net: Net, x: Tensor) -> Tensor:
    rows = torch.zeros(len(x), 2, WIDTH, dtype=x.dtype)
    rows[:, 0], rows[:, 1] = torch.tanh(net.a(x)), net.scale
    return net.head(rows[:, 0] + F.relu(rows[:, 1] * x - 5))


def _assigned_behind_a_gate(net: Net, x: Tensor) -> Tensor:
    rows = torch.tanh(net.a(x)).clone()
    rows[:, 1:3] = net.scale[1:3]
    return net.head(torch.tanh(net.a(x)) + F.relu(rows * x - 5))


def _view_changed_behind_a_gate(net: Net, x: Tensor) -> Tensor:
    table = torch.zeros(4, WIDTH, dtype=x.dtype)
    row = table[1]
    row.copy_(net.scale)
    return net.head(torch.tanh(net.a(x)) + F.relu(table[1] * x - 5))


def _sum_in_place_behind_a_gate(net: Net, x: Tensor) -> Tensor:
    scale = net.head.weight[0] * 1
    scale[1:].add_(net.scale[1:])
    return net.head(torch.tanh(net.a(x)) + F.relu(scale * x - 5))


def _closed_and_open() -> list[tuple[Callable[[nn.Module], Any], Any]]:
    return [(_nothing, 0.1 * numbers(4, WIDTH)), (_nothing, 30 * numbers(4, WIDTH))]


def _clipping_hook(net: Net, x: Tensor) -> Tensor:
    hidden = torch.tanh(net.a(x))
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    return net.head(hidden)


GLOBAL = {"time_first": False}


def _by_a_global(net: Net, x: Tensor) -> Tensor:
    steps = x.transpose(0, 1) if GLOBAL["time_first"] else x
    hidden = torch.tanh(net.a(steps.flatten(0, 1))).reshape(steps.shape)
    return net.head(hidden.mean(0 if GLOBAL["time_first"] else 1))


def _set_global(flag: bool) -> Callable[[nn.Module], None]:
    return lambda _: GLOBAL.update(time_first=flag)


def _checkpointed(net: Net, x: Tensor) -> Tensor:
    return net.head(checkpoint(lambda h: torch.tanh(net.b(torch.tanh(net.a(h)))) * net.scale, x, use_reentrant=False))


class TransposedAfterNorm(nn.Module):
    """A batch norm that receives a transposed gradient, which torch reads in the wrong order for one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer, self.head = nn.BatchNorm2d(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.norm(x).flatten(2).transpose(1, 2))).mean(1))


def _parametrised() -> nn.Module:
    model = Net(lambda net, x: net.head(torch.tanh(net.b(net.a(x))))).double().eval()
    nn.utils.parametrizations.weight_norm(model.a)
    nn.utils.parametrizations.spectral_norm(model.b)
    return model.eval()


def _through_module(wrap: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    return lambda: wrap(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)).double().eval())


def _unequal_lengths(lengths: list[int]) -> Any:
    return lambda: (numbers(len(lengths), 5, WIDTH), torch.tensor(lengths))


EXACT: dict[str, Kind] = {
    "experts": Kind(lambda: Mixture().double(), lambda: [(_nothing, numbers(5, 4, WIDTH)) for _ in range(3)]),
    "samples sorted by value": Kind(_of(_ranked), _rows(1, 5, 6)),
    "real tokens only": Kind(_of(_real_tokens), _plain(_unequal_lengths([3] * 4), _unequal_lengths([2, 4, 1, 5]))),
    "tokens cut by a list": Kind(_of(_by_list), _plain(_unequal_lengths([2, 2, 2, 5]), _unequal_lengths([1, 4, 2, 3]))),
    "time first behind a gate": Kind(
        _frames,
        lambda: [(_threshold(9.0), numbers(4, 5, WIDTH)), (_threshold(-9.0), numbers(4, 5, WIDTH))],
    ),
    "a flag in a dictionary": Kind(
        _with_settings,
        lambda: [(_time_first(flag), numbers(5, 5, WIDTH)) for flag in (True, False, True)],
    ),
    "pieces of large batches": Kind(_of(_pieces), _rows(3, 9, 3, 4)),
    "a batch padded to a multiple of four": Kind(_of(_padded_to_four), _rows(3, 4, 6)),
    "rows reversed inside": Kind(_of(_reversed_inside), _rows(3, 5, 9, 4)),
    "rows of large batches reversed inside": Kind(_of(_reversed_if_large), _rows(3, 5, 9, 4)),
    "two rows of large batches swapped inside": Kind(_of(_first_two_swapped), _rows(3, 4, 5, 9)),
    "input changed in place": Kind(_of(_in_place), _rows(4, 4)),
    "a cache made from a parameter": Kind(_of(_cached), _rows(4, 4, 5)),
    "a scripted function": Kind(_of(_through_script), _rows(4, 5)),
    "a prior as long as the batch": Kind(
        _of(_with_prior),
        _plain((numbers(3, WIDTH), torch.zeros(3).double()), (numbers(3, WIDTH), numbers(3))),
        sample=only_first,
    ),
    "prototypes as many as samples": Kind(
        _of(_to_prototypes),
        _plain((numbers(4, WIDTH), numbers(4, WIDTH)), (numbers(5, WIDTH), numbers(4, WIDTH))),
        sample=only_first,
    ),
    "a branch for some samples": Kind(_of(_some_rows), _rows(5, 5, 1, 5)),
    "a custom function behind a gate": Kind(_of(_custom_behind_a_gate), _closed_and_open),
    "a parameter written behind a gate": Kind(_of(_written_behind_a_gate), _closed_and_open),
    "a part of a parameter assigned behind a gate": Kind(_of(_assigned_behind_a_gate), _closed_and_open),
    "a view changed in place behind a gate": Kind(_of(_view_changed_behind_a_gate), _closed_and_open),
    "a sum of parameters in place behind a gate": Kind(_of(_sum_in_place_behind_a_gate), _closed_and_open),
    "a custom function that clips": Kind(
        _of(lambda net, x: net.head(_Clipped.apply(torch.tanh(net.a(x))))),
        lambda: [(_nothing, 5 * numbers(4, WIDTH))],
    ),
    "a hook that clips": Kind(_of(_clipping_hook), lambda: [(_nothing, 5 * numbers(4, WIDTH))]),
    "a flag outside of the model": Kind(
        _of(_by_a_global), lambda: [(_set_global(flag), numbers(5, 5, WIDTH)) for flag in (True, False, True)]
    ),
    "a checkpoint with a scale": Kind(_of(_checkpointed), _rows(4, 5, 1)),
    "parametrised weights": Kind(_parametrised, _rows(4, 5, 1)),
    "a scripted model": Kind(_through_module(torch.jit.script), _rows(4, 1)),
    "a traced model": Kind(_through_module(lambda m: torch.jit.trace(m, torch.randn(2, WIDTH).double())), _rows(4, 1)),
}
"""Kinds whose per-sample gradients are well defined."""


# -- coupled ----------------------------------------------------------------------------------------------------------


def _between(function: Callable[[Tensor], Tensor]) -> Kind:
    return Kind(_of(lambda net, x: net.head(function(torch.tanh(net.a(x))))), _rows(1, 5))


def _until_sure(net: Net, x: Tensor) -> Tensor:
    hidden = x
    for _ in range(4):
        hidden = hidden + torch.tanh(net.b(hidden))
        if bool((net.head(hidden).softmax(1).amax(1) > 0.7).all()):
            break
    return net.head(hidden)


def _closed_at_first(net: Net, x: Tensor) -> Tensor:
    extra = F.relu(net.b(x) - 5)
    return net.head(net.a(x) + extra - extra.mean(0))


def _as_many_as_a_tensor_says(net: Net, x: Tensor) -> Tensor:
    count = (x[:, 0] > 0).sum().clamp(max=WIDTH - 1)
    hidden = torch.tanh(net.a(x))
    return net.head(torch.cat([hidden[:, :count], 0 * hidden[:, count:]], 1))


def _one_way_if_all_are_positive(net: Net, x: Tensor) -> Tensor:
    hidden = torch.tanh(net.a(x))
    return net.head(2 * hidden if int((x[:, 0] > 0).sum()) == len(x) else hidden)


COUPLED: dict[str, Kind] = {
    "a slice as long as a tensor says": Kind(_of(_as_many_as_a_tensor_says), _rows(5, 9, 16)),
    "a total that is the size of the batch": Kind(_of(_one_way_if_all_are_positive), _rows(16, 9)),
    "flipped": _between(lambda h: h + h.flip(0)),
    "centred": _between(lambda h: h - h.mean(0)),
    "softmax over the batch": _between(lambda h: h * h.softmax(0)),
    "divided by a constant of the batch": _between(lambda h: h / h.detach().abs().amax()),
    "summed up": _between(lambda h: h.cumsum(0)),
    "ranks": _between(lambda h: h + h[:, :1].argsort(0).argsort(0)),
    "nearest neighbour": _between(lambda h: h + h[torch.cdist(h, h).fill_diagonal_(9.0).argmin(1)]),
    "statistics of the batch": Kind(
        _of(lambda net, x: net.head(F.batch_norm(net.a(x), None, None, training=True))), _rows(5, 5)
    ),
    "the last sample in large batches": Kind(
        _of(lambda net, x: net.head(torch.cat([x[:-1], x[-1:] + x[:1]]) if len(x) > 6 else x)), _rows(4, 16)
    ),
    "centred in large batches": Kind(
        _of(lambda net, x: net.head(net.a(x) - (net.a(x).mean(0) if len(x) > 4 else 0))), _rows(3, 4, 6)
    ),
    "until all are sure": Kind(_of(_until_sure), lambda: [(_nothing, 3 * numbers(8, WIDTH)) for _ in range(4)]),
    "centred behind a closed gate": Kind(
        _of(_closed_at_first), _plain(0.01 * numbers(5, WIDTH), 20 * numbers(5, WIDTH))
    ),
}
"""Kinds whose samples depend on each other."""


def _pairs(logits: Tensor) -> Tensor:
    losses = pseudo_label(logits)
    return losses + losses.roll(1).detach()


def _hard_samples(logits: Tensor) -> Tensor:
    losses = pseudo_label(logits)
    return losses * (losses >= losses.median())


COUPLING_OBJECTIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": lambda z: pseudo_label(z) - pseudo_label(z).mean(),
    "weighted by rank": lambda z: pseudo_label(z) * (1 + pseudo_label(z).detach().argsort().argsort()),
    "a neighbour as a constant": _pairs,
    "the larger half of the losses": _hard_samples,
    "equal in value": lambda z: pseudo_label(z) + pseudo_label(z).mean() - pseudo_label(z).mean().detach(),
    "contrastive": lambda z: F.cross_entropy(z @ z.roll(1, 1).T, torch.arange(len(z)), reduction="none"),
}


# -- axes -------------------------------------------------------------------------------------------------------------


class _TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(WIDTH, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][-1])


class _Flat(nn.Module):
    def __init__(self, join: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.join = nn.Linear(WIDTH, CLASSES), join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.head(x))


AXES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "time first": lambda: (_TimeFirst(), torch.randn(5, 3, WIDTH)),
    "time first, square": lambda: (_TimeFirst(), torch.randn(4, 4, WIDTH)),
    "a row per token": lambda: (_Flat(lambda z: z.flatten(0, 1)), torch.randn(4, 5, WIDTH)),
    "a row per bag": lambda: (_Flat(lambda z: z.mean(0, keepdim=True)), torch.randn(6, WIDTH)),
}
"""Models whose logits have other rows than the first axis of the inputs."""
