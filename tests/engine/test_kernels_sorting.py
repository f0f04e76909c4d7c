"""The compiled counts of sorted scores against those of plain torch and against scikit-learn."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lightning_gradmetrics.engine.kernels import sorting
from lightning_gradmetrics.engine.kernels.library import plain_kernels
from lightning_gradmetrics.meters.functional import counts as counting
from lightning_gradmetrics.meters.functional.ranking import auroc_of_counts

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("cc", "gcc", "clang")), reason="no C compiler on this machine"
)

SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "both signs": lambda z: z,
    "probabilities": torch.sigmoid,
    "negative": lambda z: -z.abs() - 1,
    "ties of both signs": lambda z: (2 * z).round(),
    "zeros of both signs": lambda z: torch.where(z > 0.5, z, 0.0 * z),
    "all equal": lambda z: z * 0 + 7,
    "infinite": lambda z: torch.where(z.abs() > 1, torch.inf * z, z),
    "subnormal": lambda z: z * torch.finfo(z.dtype).tiny / 1000,
    "adjacent": lambda z: torch.where(z > 0, 1 + torch.finfo(z.dtype).eps, torch.ones_like(z)),
    "every other": lambda z: torch.stack([z, z], 1)[:, 0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("size", [1, 2, 3001])
def test_counts_are_those_of_plain_torch(
    size: int, shape: Callable[[Tensor], Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = torch.randn(size, dtype=dtype)
    scores, target = shape(z), torch.rand(size) < torch.sigmoid(z.float())
    monkeypatch.setattr(counting, "FEWEST_FOR_KERNEL", 0)
    counts = counting.count(scores, target)
    with plain_kernels():
        expected = counting.count(scores, target)
    assert "pairs" in counts.known and "pairs" not in expected.known
    assert torch.equal(counts.scores, expected.scores)
    assert torch.equal(counts.negatives_to, expected.negatives_to)
    assert torch.equal(counts.positives_to, expected.positives_to)
    assert torch.equal(counts.pairs, expected.pairs)
    if 0 < int(target.sum()) < size:
        finite = scores.double().nan_to_num(posinf=1e300, neginf=-1e300)
        assert float(auroc_of_counts(counts)) == pytest.approx(roc_auc_score(target, finite), abs=1e-14)


def test_the_kernel_counts_large_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(counting.FEWEST_FOR_KERNEL)
    assert "pairs" in counting.count(scores, scores > 0).known
    assert "pairs" not in counting.count(scores[1:], scores[1:] > 0).known
    monkeypatch.setattr(sorting, "MOST_SAMPLES", 2**15)
    assert "pairs" not in counting.count(scores, scores > 0).known


def test_other_scores_have_no_kernel() -> None:
    scores, target = torch.randn(10), torch.ones(10, dtype=torch.bool)
    assert sorting.sorted_counts(scores.half(), target) is None
    with plain_kernels():
        assert sorting.sorted_counts(scores, target) is None
