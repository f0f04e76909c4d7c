"""Large arrays and tensors of a model are not copied in every call, and come back unchanged."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.large_parts import fingerprint, recorded_copy
from lightning_gradmetrics.classifier.preservation import preserved

SIZE = 2**18
_RANDOM = np.random.default_rng(0)


class _Box(nn.Module):
    def __init__(self, part: Any) -> None:
        super().__init__()
        self.box = SimpleNamespace(part=part)


def _through_numpy(part: Tensor) -> None:
    part.numpy()[5] += 1


def _through_data(part: Tensor) -> None:
    part.data[SIZE - 1] += 1


def _swapped(part: Any) -> None:
    first, last = float(part[7]), float(part[SIZE - 3])
    part[7], part[SIZE - 3] = last, first


@pytest.mark.parametrize(
    ("part", "change"),
    [
        (torch.rand(SIZE + 3), _through_numpy),
        (torch.rand(SIZE + 3), _through_data),
        (torch.rand(SIZE), _swapped),
        (torch.rand(SIZE, 2).t(), lambda part: part.add_(1)),
        (torch.rand(SIZE).to(torch.complex64), lambda part: part.mul_(1j)),
        (_RANDOM.random(SIZE + 3), _swapped),
        (_RANDOM.random((SIZE, 2)).T, lambda part: np.multiply(part, 2, out=part)),
        (_RANDOM.random((SIZE // 64, 64)), lambda part: part.sort(axis=1)),
        (torch.rand(SIZE), lambda part: part.data.copy_(part.view(-1, 8).flip(1).flatten())),
        (np.arange(SIZE + 1, dtype=np.float32), lambda part: part.__setitem__(SIZE, 0)),
    ],
)
def test_a_changed_part_is_restored(part: Any, change: Any) -> None:
    model, before = _Box(part), part.copy() if isinstance(part, np.ndarray) else part.clone()
    for _ in range(2):
        with preserved(model):
            change(part)
            assert (part != before).any()
        assert (part == before).all() and model.box.part is part


@pytest.mark.parametrize("part", [torch.rand(SIZE), _RANDOM.random(SIZE)])
def test_a_part_is_copied_again_only_after_the_user_has_changed_it(part: Any) -> None:
    model = _Box(part)
    with preserved(model):
        pass
    first = recorded_copy(part, fingerprint(part))
    assert recorded_copy(part, fingerprint(part)) is first
    (part.numpy() if isinstance(part, Tensor) else part)[3] = 9
    with preserved(model):
        part[3] = 1
    assert part[3] == 9 and recorded_copy(part, fingerprint(part)) is not first


@pytest.mark.parametrize("factor", [-1, 2, 0.5])
def test_fingerprint_sees_factors_and_permutations(factor: float) -> None:
    """The fingerprint changes if all numbers are negated, doubled or halved, and if equal sums are kept."""
    numbers = np.random.default_rng(0).normal(size=(512, 256))
    rows = np.eye(256)[np.arange(512) % 256]
    assert fingerprint(numbers) != fingerprint(factor * numbers)
    assert fingerprint(torch.from_numpy(numbers)) != fingerprint(torch.from_numpy(factor * numbers))
    assert fingerprint(rows) != fingerprint(np.roll(rows, 1, 0))
