"""Totals of the contributions to a fit: sums, and uniform samples of rows; independent of the order of the batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_gradmetrics.classifier.forward import Inputs, tensors_in

__all__ = ["KEY", "MAX_ENTRIES", "MAX_ROWS", "RunningTotal", "Tensors", "add", "is_rows", "row_keys", "sampled"]

Tensors = dict[str, Tensor]

MAX_ROWS = 50_000
"""Largest number of rows in ``rows/...``, which are a uniform sample of all rows."""

MAX_ENTRIES = 2**25
"""Largest number of entries in ``rows/...``; wide rows reduce the number of rows that are kept."""

KEY = "rows/key"
"""The name of the keys that order and sample the rows: hashes of each sample's input."""


def is_rows(key: str) -> bool:
    """Return whether a contribution has one row per sample."""
    return key.startswith("rows/")


def _is_models(key: str) -> bool:
    return key.startswith("model/")


def row_keys(inputs: Inputs) -> Tensor:
    """Return a hash of each sample's input: ``(N,)``, int64, CPU.

    The hash does not depend on the batch or the device, so the choice and the order of rows do not either.

    Args:
        inputs: The model's inputs ``(N, ...)``.

    Example:
        >>> images = torch.arange(12.0).view(3, 4)
        >>> bool((row_keys(images)[1:] == row_keys(images[1:])).all())
        True
    """
    keys = torch.zeros((), dtype=torch.int64)
    for number, tensor in enumerate(tensors_in(inputs)):
        if tensor.ndim:
            keys = keys * 31 + _hashed(tensor.detach(), number)
    keys = (keys ^ (keys >> 29)) * 0x1B873593CC9E2D51
    return keys ^ (keys >> 32)


def _hashed(tensor: Tensor, seed: int) -> Tensor:
    """Return each row's bits summed with random odd weights; of a long row only 4096 entries are used."""
    flat = tensor.reshape(len(tensor), -1)
    if flat.shape[1] > 4096:
        flat = flat[:, torch.linspace(0, flat.shape[1] - 1, 4096, device=flat.device).long()]
    flat = flat.contiguous().cpu()
    if flat.is_floating_point():
        flat = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(-(2**62), 2**62, flat.shape[1:], generator=generator) * 2 + 1
    return (flat.long() * weights).sum(1)


def add(totals: Sequence[Tensors]) -> Tensors:
    """Return the total of contributions, sums and a uniform sample of rows; their order and grouping do not matter."""
    values: dict[str, list[Tensor]] = {}
    for total in totals:
        for key, value in total.items():
            values.setdefault(key, []).append(value)
    return sampled({key: _joined(key, of_key) for key, of_key in values.items()})


def _joined(key: str, values: Sequence[Tensor]) -> Tensor:
    if _is_models(key):
        return values[0].cpu()
    return torch.cat(list(values)) if is_rows(key) else _sum(values)


def _sum(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.cpu() for value in values]).sum(0)


def _cap(rows: Tensors) -> int:
    """Return the largest number of rows to keep."""
    width = 0
    for key, value in rows.items():
        if is_rows(key):
            width += value[:1].numel()
    return max(1, min(MAX_ROWS, MAX_ENTRIES // max(1, width)))


def sampled(total: Tensors) -> Tensors:
    """Return the total with at most :data:`MAX_ROWS` rows, in the order of their keys."""
    if KEY not in total:
        return total
    keep = total[KEY].argsort(stable=True)[: _cap(total)]
    sample = {}
    for key, value in total.items():
        sample[key] = value[keep] if is_rows(key) else value
    return sample


@dataclass
class RunningTotal:
    """A total that is updated with one contribution at a time; it stores at most twice the rows of its result."""

    sums: Tensors = field(default_factory=dict)
    rows: list[Tensors] = field(default_factory=list)
    waiting: int = 0

    def add(self, contribution: Tensors) -> None:
        """Add a batch's contribution."""
        rows = {}
        for key, value in contribution.items():
            if is_rows(key):
                rows[key] = value
            elif key not in self.sums:
                self.sums[key] = value
            elif not _is_models(key):
                self.sums[key] = self.sums[key] + value
        if rows:
            self.rows.append(rows)
            self.waiting += len(rows[KEY])
            if self.waiting > 2 * _cap(rows):
                self.rows = [add(self.rows)]
                self.waiting = len(self.rows[0][KEY])

    @property
    def total(self) -> Tensors:
        """The total so far, on the CPU."""
        total = {key: value.cpu() for key, value in self.sums.items()}
        return {**total, **add(self.rows)}
