"""The softmax of large maps and batches by one compiled kernel; the parts equal those of plain torch up to rounding."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.jobs import SoftmaxJob, SoftmaxPowerJob, SoftmaxRowJob
from lightning_gradmetrics.engine.kernels.library import library_for, parallel_runner
from lightning_gradmetrics.gradients.softmax import Softmax

__all__ = ["FEWEST_ENTRIES", "MOST_CLASSES", "softmax_of"]

FEWEST_ENTRIES = 2**16
"""Smaller maps are not worth a compiler."""

MOST_CLASSES = 256
"""``MOST_CLASSES`` of ``softmax.c``."""

FEWEST_ROW_ENTRIES = 2**14
"""Smaller batches take as long in plain torch."""

MOST_ROW_CLASSES = 16384
"""``MOST_ROW_CLASSES`` of ``softmax.c``."""

PARTS = ("top", "odds", "spread", "squares", "second", "uniform", "slope")
"""The results of the kernel, in its order."""


def softmax_of(logits: Tensor, temperature: float = 1.0) -> Softmax:
    """Return the softmax over axis 1 of logits ``(N, C, *P)``, by the compiled kernel if they are many and on a CPU.

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
    if logits.ndim == 2:
        is_fit = logits.numel() >= FEWEST_ROW_ENTRIES and logits.shape[1] <= MOST_ROW_CLASSES and logits.stride(1) == 1
    else:
        is_fit = logits.numel() >= FEWEST_ENTRIES and logits.shape[1] <= MOST_CLASSES
    library = library_for(logits.dtype) if is_fit and logits.device.type == "cpu" else None
    if library is None:
        return None
    out = _of_rows(library, logits) if logits.ndim == 2 else _of_maps(library, logits)
    if bool(out[1].isnan().any()):
        return None
    shape = (len(PARTS), len(logits), *logits.shape[2:])
    return dict(zip(PARTS, out.view(shape).unbind(), strict=True))


def _of_rows(library: Any, logits: Tensor) -> Tensor:
    """Return the kernel's results ``(7, N)`` for logits ``(N, C)``."""
    samples, classes = logits.shape
    out = logits.new_empty(len(PARTS), samples)
    job = SoftmaxRowJob(
        z=logits.data_ptr(), out=out.data_ptr(), samples=samples, classes=classes, z_sample=logits.stride(0)
    )
    library.softmax_rows(ctypes.byref(job), parallel_runner(), torch.get_num_threads())
    return out


def _of_maps(library: Any, logits: Tensor) -> Tensor:
    """Return the kernel's results ``(7, N, P)`` for logits ``(N, C, *P)``."""
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
    return out


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
        self.squared_entropy_gradient = parts["slope"]

    def powers_of_others(self, power: float, complement: float = 0.0) -> Tensor:
        """Return ``sum_c p_c^a (1 - p_c)^b`` over all classes but the predicted one, ``(N, *P)``."""
        library = library_for(self.logits.dtype) if self.logits.ndim == 2 else None
        if library is None:
            return super().powers_of_others(power, complement)
        samples, classes = self.logits.shape
        out = self.logits.new_empty(samples)
        job = SoftmaxPowerJob(
            z=self.logits.data_ptr(),
            top=self.top.data_ptr(),
            odds=self.odds.data_ptr(),
            second=self.second.data_ptr(),
            out=out.data_ptr(),
            power=power,
            complement=complement,
            samples=samples,
            classes=classes,
            z_sample=self.logits.stride(0),
        )
        library.softmax_powers(ctypes.byref(job), parallel_runner(), torch.get_num_threads())
        return out
