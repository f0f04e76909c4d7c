"""The softmax of large maps by one pass of a compiled kernel; the parts equal those of plain torch up to rounding."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.jobs import SoftmaxJob
from lightning_gradmetrics.engine.kernels.library import library_for, parallel_runner
from lightning_gradmetrics.gradients.softmax import Softmax

__all__ = ["FEWEST_ENTRIES", "MOST_CLASSES", "softmax_of"]

FEWEST_ENTRIES = 2**16
"""Smaller maps are not worth a compiler."""

MOST_CLASSES = 256
"""``MOST_CLASSES`` of ``softmax.c``."""

PARTS = ("top", "odds", "spread", "squares", "second", "uniform")
"""The results of the kernel, in its order."""


def softmax_of(logits: Tensor, temperature: float = 1.0) -> Softmax:
    """Return the softmax over axis 1 of logits ``(N, C, *P)``, by the compiled kernel for large maps on a CPU.

    Args:
        logits: ``(N, C, *P)``.
        temperature: Divides the logits.

    Example:
        >>> softmax_of(torch.zeros(1, 4, 128, 128)).error[0, 0, 0]
        tensor(0.7500)
    """
    softmax = Softmax(logits, temperature)
    parts = _parts(softmax.logits)
    return softmax if parts is None else _FusedSoftmax(softmax, parts)


def _parts(logits: Tensor) -> dict[str, Tensor] | None:
    """Return the kernel's results ``(N, *P)`` by name; ``None`` where the kernel does not apply or a result is NaN."""
    is_large = logits.ndim > 2 and logits.numel() >= FEWEST_ENTRIES and logits.shape[1] <= MOST_CLASSES
    library = library_for(logits.dtype) if is_large and logits.device.type == "cpu" else None
    if library is None:
        return None
    maps = logits.flatten(2).contiguous()
    samples, classes, positions = maps.shape
    out = maps.new_empty(len(PARTS), samples, positions)
    job = SoftmaxJob(
        z=maps.data_ptr(),
        out=out.data_ptr(),
        samples=samples,
        classes=classes,
        positions=positions,
        z_sample=maps.stride(0),
        z_class=maps.stride(1),
    )
    library.softmax_maps(ctypes.byref(job), parallel_runner(), torch.get_num_threads())
    if bool(out[1].isnan().any()):
        return None
    shape = (len(PARTS), samples, *logits.shape[2:])
    return dict(zip(PARTS, out.view(shape).unbind(), strict=True))


class _FusedSoftmax(Softmax):
    """A softmax whose parts per position are known.

    Args:
        softmax: The softmax.
        parts: The results of the kernel by name, ``(N, *P)`` each.
    """

    def __init__(self, softmax: Softmax, parts: dict[str, Tensor]) -> None:
        self.logits, self.temperature = softmax.logits, softmax.temperature
        odds = parts["odds"]
        share = 1 / (1 + odds)
        # Cached properties of the base class
        self._top_of_map = parts["top"]
        self.odds = odds
        self.entropy = odds.log1p() + parts["spread"] * share
        self.other_squares = parts["squares"] * share.square()
        self.second = parts["second"] * share
        self.distance_to_uniform = parts["uniform"]
