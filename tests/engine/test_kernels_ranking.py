"""The compiled totals of ranking metrics against the metrics in plain torch."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.library import plain_kernels
from lightning_gradmetrics.engine.kernels.ranking import ranking_totals
from lightning_gradmetrics.meters.functional.counts import Counts
from lightning_gradmetrics.meters.functional.ranking import average_precision_of_counts
from lightning_gradmetrics.meters.functional.selective import aurc_of_counts, harmonic_table

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("cc", "gcc", "clang")), reason="no C compiler on this machine"
)

WEIGHTS = {"one row": (1.0, 1.0), "weighted positives": (1.0, 0.37), "weighted": (2.5, 3.25)}


def sides(size: int, weights: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return cumulative counts with ties of both classes, runs of one class, and scores without samples."""
    generator = torch.Generator().manual_seed(size)
    number = torch.randint(-2, 3, (2, size), generator=generator).clamp_(min=0)
    number[0, : size // 3] = 0
    number[:, 0] = torch.tensor([0, 1])
    pair = []
    for row, weight in zip(number, weights, strict=True):
        total = row.cumsum(0)
        pair.append(total.int() if weight == 1 else weight * total.double())
    return pair[0], pair[1]


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("size", [1, 3, 8, 1023, 1024, 1025, 20_001])
def test_totals_are_those_of_the_metrics(size: int, weights: tuple[float, float]) -> None:
    for negatives_to, positives_to in (sides(size, weights), sides(size, weights)[::-1]):
        counts = Counts(torch.arange(size), negatives_to, positives_to)
        samples = float(counts.negatives + counts.positives)
        totals = ranking_totals(negatives_to, positives_to, harmonic_table(int(samples) + 1, torch.device("cpu")))
        assert totals is not None
        expected = [
            counts.pairs,
            aurc_of_counts(counts) * samples,
            average_precision_of_counts(counts) * counts.positives,
            average_precision_of_counts(counts, "in") * counts.negatives,
        ]
        for value, reference in zip(totals, expected, strict=True):
            if float(counts.positives) and float(counts.negatives):
                assert value == pytest.approx(float(reference), rel=1e-12, abs=1e-12)


def test_other_counts_have_no_kernel() -> None:
    negatives_to, positives_to = sides(100, (1.0, 1.0))
    harmonic = harmonic_table(1000, torch.device("cpu"))
    assert ranking_totals(negatives_to.long(), positives_to, harmonic) is None
    assert ranking_totals(negatives_to[::2], positives_to[::2], harmonic) is None
    assert ranking_totals(negatives_to[:0], positives_to[:0], harmonic) is None
    with plain_kernels():
        assert ranking_totals(negatives_to, positives_to, harmonic) is None
