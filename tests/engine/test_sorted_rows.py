"""Mixtures of experts that sort rows by expert are planned if a proof follows the rows, and refused or exact if it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_gradmetrics.engine import auto, gradient_statistics
from lightning_gradmetrics.engine.planning.separability import proof_of
from lightning_gradmetrics.engine.refusals import REFUSALS
from lightning_gradmetrics.engine.tracing.dependence import DependenceTrace
from lightning_gradmetrics.engine.tracing.outline import Outline, Recording
from lightning_gradmetrics.engine.tracing.sorts import SortedKeys
from tests.engine.cases import needs_grouped_products

EXPERTS, WIDTH, CHOSEN = 4, 8, 2


class _Sorted:
    """The rows of a batch in the order of their experts.

    Args:
        experts: The chosen experts of each position, ``(N T, K)``.
    """

    def __init__(self, experts: Tensor) -> None:
        self.experts = experts.reshape(-1)
        self.keys, self.places = torch.sort(self.experts)
        self.tokens = self.places // experts.shape[1]

    def ends(self) -> Tensor:
        counts = torch.histc(self.keys.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
        return counts.cumsum(0, dtype=torch.int32)

    def back(self, rows: Tensor) -> Tensor:
        inverse = torch.empty_like(self.places)
        inverse[self.places] = torch.arange(len(self.places))
        return rows[inverse]


class _Model(nn.Module):
    """A mixture of experts; its forward pass sends rows through the experts in ``mix``."""

    def __init__(self, mix, chosen: int = CHOSEN) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.head, self.chosen = nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 4), chosen
        self.first = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 2)
        self.second = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 2)
        self.biases = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights, experts = self.router(rows).softmax(1).topk(self.chosen, 1)
        mixed = self.mix(self, rows, weights, experts)
        logits: Tensor = self.head((rows + mixed).view_as(x).mean(1))
        return logits


def _usual(model, rows, weights, experts):
    order = _Sorted(experts)
    hidden = torch._grouped_mm(rows[order.tokens], model.first.transpose(1, 2), offs=order.ends())
    products = torch._grouped_mm(torch.relu(hidden), model.second, offs=order.ends())
    products = products * weights.reshape(-1)[order.places].unsqueeze(1)
    return order.back(products).view(len(rows), -1, WIDTH).sum(1)


def _with_argsort(model, rows, weights, experts):
    key = experts[:, 0]
    places = key.argsort(stable=True)
    ends = torch.bincount(key, minlength=EXPERTS).cumsum(0).to(torch.int32)
    products = torch._grouped_mm(rows[places], model.first, offs=ends)
    hidden, gate = torch.stack([products.tanh(), products], 2).unbind(2)
    back = torch.zeros_like(rows).index_copy(0, places, hidden * gate.sigmoid())
    return back * weights[:, :1] + (rows @ model.second[0])


def _with_biases(model, rows, weights, experts):
    order = _Sorted(experts)
    hidden = torch._grouped_mm(rows[order.tokens], model.first, offs=order.ends())
    hidden = hidden.add_(model.biases[order.keys]).clamp(min=-1)
    return order.back(hidden * model.biases[order.keys]).view(len(rows), -1, WIDTH).sum(1)


def _batches():
    """Nine batches whose routings change, with experts for no row and one expert for all rows, and two lengths."""
    torch.manual_seed(1)
    for size, length, scale in [(5, 6, 1)] * 3 + [
        (5, 6, 0),
        (5, 6, -9),
        (5, 6, 9),
        (3, 6, 1),
        (1, 6, 1),
        (5, 9, 1),
        (8, 9, 9),
    ]:
        x = torch.randn(size, length, WIDTH)
        yield x + scale * torch.linspace(-1, 1, WIDTH) * (abs(scale) > 1)


@needs_grouped_products
@pytest.mark.parametrize("mix", [_usual, _with_argsort, _with_biases])
@pytest.mark.parametrize("chosen", [lambda name: name in ("first", "biases"), None], ids=["experts", "all"])
def test_sorted_rows_are_planned_and_exact(mix, chosen, monkeypatch) -> None:
    """Each group is compared with the keys of the sort in every batch."""
    compared = []
    ends_at = SortedKeys.ends_at
    monkeypatch.setattr(SortedKeys, "ends_at", lambda keys, ends: compared.append(ends) or ends_at(keys, ends))
    model = _Model(mix).eval()
    counts = set()
    for x in _batches():
        arguments = {"parameters": chosen, "per_parameter": True}
        expected = gradient_statistics(model, x, "pseudo_label", engine="reference", **arguments)
        found = gradient_statistics(model, x, "pseudo_label", **arguments)
        for name in ("max", "min", "std"):
            assert torch.allclose(getattr(found, name), getattr(expected, name), 1e-4, 1e-6)
        for p in (1, 2):
            assert torch.allclose(found.norm(p), expected.norm(p), 1e-4, 1e-6)
        counts.update(tuple(ends.diff(prepend=ends[:1] * 0).tolist()) for ends in compared)
    (strategies,) = auto._STRATEGIES[model].values()
    assert all(strategy.plan.sorts and strategy.sizes is not None for strategy in strategies)
    assert len(counts) > 6
    assert any(max(sizes) * model.chosen == sum(sizes) for sizes in counts)  # an expert of all positions
    assert any(min(sizes) == 0 for sizes in counts)


def _by_popularity(model, rows, weights, experts):
    """The first matrix is that of the expert with the most rows."""
    counts = torch.bincount(experts.reshape(-1), minlength=EXPERTS)
    rank = counts.argsort(descending=True).argsort()
    order = _Sorted(rank[experts])
    products = torch._grouped_mm(rows[order.tokens], model.first, offs=order.ends())
    return order.back(products).view(len(rows), -1, WIDTH).sum(1)


def _not_put_back(model, rows, weights, experts):
    order = _Sorted(experts)
    products = torch._grouped_mm(rows[order.tokens], model.first, offs=order.ends())
    return products.view(len(rows), -1, WIDTH).sum(1)


def _put_back_twice(model, rows, weights, experts):
    order = _Sorted(experts)
    products = torch._grouped_mm(rows[order.tokens], model.first, offs=order.ends())
    return order.back(products)[order.places].view(len(rows), -1, WIDTH).sum(1)


def _sorted_twice(model, rows, weights, experts):
    order = _Sorted(experts)
    products = torch._grouped_mm(rows[order.tokens], model.first, offs=order.ends())
    return order.back(products[order.places]).view(len(rows), -1, WIDTH).sum(1)


def _other_inverse(model, rows, weights, experts):
    order, other = _Sorted(experts), _Sorted(experts.flip(1))
    products = torch._grouped_mm(rows[order.tokens], model.first, offs=order.ends())
    return other.back(products).view(len(rows), -1, WIDTH).sum(1)


def _changed_inverse(model, rows, weights, experts):
    order = _Sorted(experts)
    products = torch._grouped_mm(rows[order.tokens], model.first, offs=order.ends())
    inverse = torch.empty_like(order.places)
    inverse[order.places] = torch.arange(len(order.places))
    inverse.copy_(inverse.flip(0))
    return products[inverse].view(len(rows), -1, WIDTH).sum(1)


def _read_by_a_view(model, rows, weights, experts):
    """A view of samples that are replaced by the inverse of the sort."""
    order = _Sorted(experts)
    products = torch._grouped_mm(rows[order.tokens], model.first, offs=order.ends())
    inverse = order.experts.clone()
    view = inverse.view(-1)
    inverse[order.places] = torch.arange(len(order.places))
    back = products[inverse] * (1 + view.unsqueeze(1) / 100)
    return back.view(len(rows), -1, WIDTH).sum(1)


def _mirrored_inverse(model, rows, weights, experts):
    """The numbers of the rows from the end, as negative numbers."""
    order = _Sorted(experts)
    products = torch._grouped_mm(rows[order.tokens], model.first, offs=order.ends())
    inverse, numbers = torch.empty_like(order.places), torch.arange(len(order.places))
    numbers.view(-1).neg_()
    inverse[order.places] = numbers
    return products[inverse].view(len(rows), -1, WIDTH).sum(1)


def _changed_keys(model, rows, weights, experts):
    """Counts keys that are others than those of the sort."""
    order = _Sorted(experts)
    order.experts.mul_(3).remainder_(EXPERTS)
    ends = torch.bincount(order.experts, minlength=EXPERTS).cumsum(0).to(torch.int32)
    products = torch._grouped_mm(rows[order.tokens], model.first, offs=ends)
    return order.back(products).view(len(rows), -1, WIDTH).sum(1)


def _other_sort(model, rows, weights, experts):
    """The rows of the second expert of each position, in groups of the first one."""
    first, second = _Sorted(experts[:, :1]), _Sorted(experts[:, 1:])
    products = torch._grouped_mm(rows[second.tokens], model.first, offs=first.ends())
    return second.back(products)


def _gate_between_rows(model, rows, weights, experts):
    order = _Sorted(experts)
    products = torch._grouped_mm(rows[order.tokens], model.first, offs=order.ends())
    products = products * (1 + torch.relu(products.mean(0) - 3))
    return order.back(products).view(len(rows), -1, WIDTH).sum(1)


def _neighbours(model, rows, weights, experts):
    order = _Sorted(experts)
    products = torch._grouped_mm(rows[order.tokens], model.first, offs=order.ends())
    return order.back(products + 0.1 * products.roll(1, 0)).view(len(rows), -1, WIDTH).sum(1)


def _by_place(model, rows, weights, experts):
    order = _Sorted(experts)
    products = torch._grouped_mm(rows[order.tokens], model.first, offs=order.ends())
    products = products * torch.linspace(0, 1, len(products)).unsqueeze(1)
    return order.back(products).view(len(rows), -1, WIDTH).sum(1)


def _places_as_values(model, rows, weights, experts):
    order = _Sorted(experts)
    products = torch._grouped_mm(rows[order.tokens], model.first, offs=order.ends())
    products = products * (1 + order.places.unsqueeze(1) / 10)
    return order.back(products).view(len(rows), -1, WIDTH).sum(1)


def _bias_by_place(model, rows, weights, experts):
    order = _Sorted(experts)
    products = torch._grouped_mm(rows[order.tokens], model.first, offs=order.ends())
    return order.back(products + model.biases[order.places % EXPERTS]).view(len(rows), -1, WIDTH).sum(1)


def _mean_in_place(model, rows, weights, experts):
    order = _Sorted(experts)
    products = torch._grouped_mm(rows[order.tokens], model.first, offs=order.ends())
    products.mul_(1 + torch.relu(products.mean(0) - 3))
    return order.back(products).view(len(rows), -1, WIDTH).sum(1)


def _changed_by_a_view(model, rows, weights, experts):
    order = _Sorted(experts)
    products = torch._grouped_mm(rows[order.tokens], model.first, offs=order.ends())
    products.view(-1)[: len(rows)].mul_(2)
    return order.back(products).view(len(rows), -1, WIDTH).sum(1)


def _descending(model, rows, weights, experts):
    keys, places = torch.sort(experts.reshape(-1), descending=True)
    ends = torch.bincount(keys, minlength=EXPERTS).cumsum(0).to(torch.int32)
    products = torch._grouped_mm(rows[places // 2], model.first, offs=ends)
    return torch.zeros_like(products).index_copy(0, places, products).view(len(rows), -1, WIDTH).sum(1)


_COUPLED = [_by_popularity, _not_put_back, _put_back_twice, _changed_inverse, _changed_keys, _other_sort]
_INVERSES = [_read_by_a_view, _mirrored_inverse]
_MORE = [_sorted_twice, _other_inverse, _bias_by_place, _mean_in_place, _changed_by_a_view]
_OTHERS = [_gate_between_rows, _neighbours, _by_place, _places_as_values, _descending]


def _is_proven(model: nn.Module, x: Tensor) -> bool:
    """Return whether the operations of two and of three samples show that samples stay apart."""
    traces = []
    for size in (2, 3):
        samples, recording = x[:size].clone(), Recording(Outline({}))
        trace = DependenceTrace([samples], model.parameters(), recording)
        with trace, recording:
            logits = model(samples)
        traces.append((trace, logits))
    (two, _), (three, logits) = traces
    return proof_of(two.operations, three.operations, three.samples, three.serial(logits)).layouts is not None


class _SortedSamples(nn.Module):
    """Sorts whole samples by one of their features, and puts them back or not."""

    def __init__(self, puts_back: bool) -> None:
        super().__init__()
        self.puts_back = puts_back

    def forward(self, x: Tensor) -> Tensor:
        places = x[:, 0].argsort()
        rows = torch.tanh(x[places])
        return torch.zeros_like(rows).index_copy(0, places, rows) if self.puts_back else rows


@pytest.mark.parametrize("puts_back", [True, False])
def test_samples_are_proven_to_stay_apart_if_they_are_put_back(puts_back: bool) -> None:
    assert _is_proven(_SortedSamples(puts_back), torch.randn(3, WIDTH)) == puts_back


@pytest.mark.parametrize(
    ("ends", "fits"), [([1, 1, 3], True), ([1, 2, 3], False), ([0, 1, 3], False), ([1, 1], False), ([1, 1, 3, 3], True)]
)
def test_groups_are_compared_with_sorted_keys(ends: list[int], fits: bool) -> None:
    keys = SortedKeys(torch.tensor([1, 0, 2]), torch.tensor([0, 2, 2]))
    assert keys.ends_at(torch.tensor(ends)) == fits


@needs_grouped_products
@pytest.mark.parametrize("mix", [_usual, _with_argsort, _with_biases])
def test_rows_that_are_put_back_are_proven_to_stay_apart(mix) -> None:
    assert _is_proven(_Model(mix), next(_batches()))


@needs_grouped_products
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mix", [*_COUPLED, *_INVERSES, *_MORE, *_OTHERS])
def test_sorted_rows_that_depend_on_others_are_not_proven_and_refused_or_exact(mix) -> None:
    model = _Model(mix).eval()
    assert not _is_proven(model, next(_batches()))
    for x in _batches():
        expected = gradient_statistics(model, x, "pseudo_label", per_parameter=True, engine="reference").norm(2)
        try:
            found = gradient_statistics(model, x, "pseudo_label", per_parameter=True).norm(2)
        except REFUSALS:
            continue
        assert torch.allclose(found, expected, 1e-4, 1e-6)
