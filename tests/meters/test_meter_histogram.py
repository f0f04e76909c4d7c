"""The constant-memory mode: exact while there is room, then approximate with bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradmetrics.meters.functional.bounds import auroc_bounds
from lightning_gradmetrics.meters.functional.counts import count
from lightning_gradmetrics.meters.functional.histogram import (
    LEVEL,
    NEGATIVE,
    _sorted_cells,
    append,
    cells_of,
    counts_of_table,
    empty_table,
    merge_tables,
    score_of_key,
    sorted_key,
)
from lightning_gradmetrics.meters.functional.ranking import auroc_of_counts

floats = st.floats(allow_nan=False)


def mixture(z, seldom):
    return torch.where(torch.rand(len(z)) < 0.5, seldom, z.sign() * 10 ** (60 * z.abs()))


STREAMS = {
    "normal": lambda z: z.float(),
    "energies in [9, 10]": lambda z: (9.5 + z / 10).float(),
    "within 1e-4 of 1": lambda z: (-(1 - 1e-4 * torch.sigmoid(z))).float(),
    "mostly within 1e-4 of 1": lambda z: torch.where(torch.rand(len(z)) < 0.9, z * 1e-5 - 1, -torch.sigmoid(3 - z)),
    "1e8 and a little": lambda z: 1e8 + z,
    "1 and 1e-12": lambda z: 1 + 1e-12 * z,
    "hundreds of decades": lambda z: z.sign() * 10 ** (60 * z.abs()),
    "half scattered, half in one place": lambda z: mixture(z, 7.3 + 1e-9 * z),
    "sorted": lambda z: z.sort().values,
    "drifting": lambda z: z / 10 + torch.linspace(0, 10, len(z), dtype=torch.float64),
    "wide, then narrow": lambda z: torch.cat([z[: len(z) // 5] * 1e10, z[len(z) // 5 :]]),
    "1e-300": lambda z: z * 1e-300,
    "few values": lambda z: (10 * z).round(),
}


def stream(name: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    target = torch.rand(size) < 0.2
    return STREAMS[name](torch.randn(size).double() + target), target


def filled(scores, target, bins, batch=10_000):
    table = empty_table(bins)
    for one, other in zip(scores.split(batch), target.split(batch), strict=True):
        table = append(table, one, other)
    return table


@given(st.lists(floats, min_size=2, max_size=30))
def test_keys_order_as_scores_do(values):
    scores = torch.tensor(values, dtype=torch.float64)
    key = sorted_key(scores)
    assert torch.equal(key[:, None] < key, scores[:, None] < scores)
    assert torch.equal(key[:, None] == key, scores[:, None] == scores)
    assert torch.equal(score_of_key(key), scores)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(floats, st.booleans()), min_size=1, max_size=50), st.integers(1, 7))
def test_exact_while_there_is_room(pairs, batch):
    scores, target = torch.tensor([p[0] for p in pairs]).double(), torch.tensor([p[1] for p in pairs])
    found, exact = counts_of_table(filled(scores, target, 1024, batch)), count(scores, target)
    assert torch.equal(found.scores, exact.scores)
    assert torch.equal(found.negative, exact.negative)
    assert torch.equal(found.positive, exact.positive)


def largest_folded_fraction(table: torch.Tensor) -> float:
    """Return the largest fraction of a class in a folded cell; 0 where every metric is exact."""
    cells = _sorted_cells(table)
    fractions = cells[NEGATIVE:] / cells[NEGATIVE:].sum(1, keepdim=True).clamp(min=1)
    return float(fractions[:, cells[LEVEL] > 0].max()) if bool((cells[LEVEL] > 0).any()) else 0.0


def test_exact_up_to_the_stated_number_of_distinct_scores():
    scores = torch.randn(4 * 1024).double().repeat(20)
    target = torch.rand(len(scores)) < 0.3
    table = filled(scores, target, 1024, 777)
    assert largest_folded_fraction(table) == 0
    assert auroc_of_counts(counts_of_table(table)) == auroc_of_counts(count(scores, target))
    assert auroc_bounds(table)[0] == auroc_bounds(table)[1]


@pytest.mark.parametrize("name", STREAMS)
def test_bounds_are_valid_and_no_score_is_lost(name):
    scores, target = stream(name, 60_000)
    exact = auroc_of_counts(count(scores, target)).item()
    table = filled(scores, target, 1024)
    low, high = (bound.item() for bound in auroc_bounds(table))
    found = counts_of_table(table)
    assert (found.positive.sum(), found.negative.sum()) == (target.sum(), (~target).sum())
    assert low - 1e-12 <= exact <= high + 1e-12
    assert high - low <= 29 * largest_folded_fraction(table) + 1e-12
    assert high - low < 0.005
    assert abs(auroc_of_counts(found).item() - exact) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMS)
def test_a_million_scores_within_a_tenth_of_a_point(name):
    scores, target = stream(name, 1_000_000)
    exact = auroc_of_counts(count(scores, target)).item()
    table = filled(scores, target, 16384, 65_536)
    low, high = (bound.item() for bound in auroc_bounds(table))
    assert low - 1e-12 <= exact <= high + 1e-12
    assert high - low < 0.001
    assert abs(auroc_of_counts(counts_of_table(table)).item() - exact) < 1e-5


def test_negatives_first_and_positives_later():
    scores, target = stream("normal", 60_000)
    order = target.long().argsort(stable=True)
    table = filled(scores[order], target[order], 1024)
    exact = auroc_of_counts(count(scores, target)).item()
    low, high = (bound.item() for bound in auroc_bounds(table))
    assert low <= exact <= high
    assert abs(auroc_of_counts(counts_of_table(table)).item() - exact) < 1e-4


def test_merging_adds():
    scores, target = stream("normal", 3_000)
    whole = filled(scores, target, 1024)
    parts = [filled(s, t, 1024) for s, t in zip(scores.split(700), target.split(700), strict=True)]
    for order in (parts, parts[::-1]):
        merged = merge_tables(torch.stack(order))
        assert merged.shape == whole.shape
        assert merged.dtype == torch.int64
        for one, other in zip(
            (merged[:, merged[2:].sum(0) > 0], counts_of_table(merged).positive),
            (merge_tables(whole[None])[:, : cells_of(merged).shape[1]], counts_of_table(whole).positive),
            strict=True,
        ):
            assert torch.equal(one, other)


def test_merging_full_tables_stays_close():
    scores, target = stream("hundreds of decades", 60_000)
    parts = [filled(s, t, 1024) for s, t in zip(scores.split(20_000), target.split(20_000), strict=True)]
    merged = merge_tables(torch.stack(parts))
    exact = auroc_of_counts(count(scores, target)).item()
    low, high = (bound.item() for bound in auroc_bounds(merged))
    assert low <= exact <= high
    assert int(merged[2:].sum()) == 60_000
    assert abs(auroc_of_counts(counts_of_table(merged)).item() - exact) < 1e-4


def test_extreme_scores():
    scores = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 5e-324, 1.7e308, -1.7e308], dtype=torch.float64)
    table = filled(scores.repeat(9000), torch.rand(63_000) < 0.5, 1024)
    assert counts_of_table(table).scores.tolist() == [-torch.inf, -1.7e308, 0.0, 5e-324, 1.7e308, torch.inf]
