"""The softmax of large maps and batches by one compiled kernel; the parts equal those of plain torch up to rounding."""

from __future__ import annotations

import ctypes
import math
from functools import cached_property
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

FEW_CLASSES = 32
"""Up to this number of classes, samples are processed side by side, as positions of a map: a vector would be nearly empty."""

PARTS = ("top", "odds", "spread", "squares", "second", "uniform", "slope")
"""The results of the kernels, in their order."""


def softmax_of(
    logits: Tensor, temperature: float = 1.0, dtype: torch.dtype | None = None, roots: bool = False
) -> Softmax:
    """Return the softmax over axis 1 of logits ``(N, C, *P)``, by the compiled kernel if they are many and on a CPU.

    Args:
        logits: ``(N, C, *P)``.
        temperature: Divides the logits.
        dtype: The type of the results; by default that of the logits, at least float32. The kernel computes float64 results
            of float32 samples without a copy in float64.
        roots: Whether the kernel also sums the square roots of the probabilities of samples, which ``powers_of_others(0.5)``
            otherwise does in a second pass.

    Example:
        >>> softmax_of(torch.zeros(1, 4, 128, 128)).error[0, 0, 0]
        tensor(0.7500)
    """
    softmax = _FusedSoftmax(logits, temperature, dtype)
    parts = _parts(softmax, roots)
    if parts is None:
        return Softmax(logits, temperature, dtype)
    softmax.take(parts)
    return softmax


def _parts(softmax: _FusedSoftmax, roots: bool) -> dict[str, Tensor] | None:
    """Return the kernel's results ``(N, *P)`` by name; ``None`` where the kernel does not apply or a result is NaN."""
    given, classes = softmax.given, softmax.given.shape[1]
    if given.ndim == 2:
        is_fit = given.numel() >= FEWEST_ROW_ENTRIES and classes <= MOST_ROW_CLASSES and given.stride(1) == 1
    else:
        is_fit = given.numel() >= FEWEST_ENTRIES and classes <= MOST_CLASSES
    library = library_for(softmax.dtype) if is_fit and given.device.type == "cpu" else None
    if library is None:
        return None
    if given.ndim > 2:
        out = _of_maps(library, softmax.logits)
    elif classes <= FEW_CLASSES and not roots:
        out = _of_maps(library, softmax.logits.T[None])[:, 0]
    else:
        out = _of_rows(library, softmax, roots)
    if math.isnan(out[1].sum().item()):
        return None
    names = (*PARTS, "roots") if len(out) > len(PARTS) else PARTS
    return dict(zip(names, out.view(-1, len(given), *given.shape[2:]).unbind(), strict=True))


def _of_rows(library: Any, softmax: _FusedSoftmax, roots: bool) -> Tensor:
    """Return the kernel's results ``(7, N)`` for logits ``(N, C)``, with roots ``(8, N)``."""
    rows = softmax.rows
    samples, classes = rows.shape
    out = rows.new_empty(len(PARTS) + roots, samples, dtype=softmax.dtype)
    job = SoftmaxRowJob(
        z=rows.data_ptr(),
        out=out.data_ptr(),
        samples=samples,
        classes=classes,
        z_sample=rows.stride(0),
        narrow=rows.dtype == torch.float32,
        with_roots=roots,
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
    """A softmax whose parts per position are known."""

    _parts: dict[str, Tensor]
    """The kernel's results."""

    @property
    def rows(self) -> Tensor:
        """The logits of samples as the kernel reads them: in the type of the results, or in float32."""
        is_direct = self.temperature == 1 and self.given.dtype == torch.float32
        return self.given if is_direct else self.logits

    def take(self, parts: dict[str, Tensor]) -> None:
        """Store the kernel's results by name, ``(N, *P)`` each; those that need no more arithmetic as cached properties."""
        self._parts = parts
        self._top_of_map = parts["top"]
        self.odds = parts["odds"]
        self.distance_to_uniform = parts["uniform"]
        self.squared_entropy_gradient = parts["slope"]

    @cached_property
    def _top_share(self) -> Tensor:
        """The largest probability, ``(N, *P)``."""
        return 1 / (1 + self.odds)

    @cached_property
    def entropy(self) -> Tensor:
        """The entropy in nats, ``(N, *P)``."""
        return self.odds.log1p() + self._parts["spread"] * self._top_share

    @cached_property
    def other_squares(self) -> Tensor:
        """The sum of the squared probabilities of all classes but the predicted one, ``(N, *P)``."""
        return self._parts["squares"] * self._top_share.square()

    @cached_property
    def second(self) -> Tensor:
        """The second largest probability, ``(N, *P)``."""
        return self._parts["second"] * self._top_share

    def powers_of_others(self, power: float, complement: float = 0.0) -> Tensor:
        """Return ``sum_c p_c^a (1 - p_c)^b`` over all classes but the predicted one, ``(N, *P)``."""
        if "roots" in self._parts and (power, complement) == (0.5, 0.0):
            return self._parts["roots"] * self._top_share.sqrt()
        library = library_for(self.dtype) if self.given.ndim == 2 else None
        if library is None:
            return super().powers_of_others(power, complement)
        rows = self.rows
        samples, classes = rows.shape
        out = torch.empty_like(self.odds)
        job = SoftmaxPowerJob(
            z=rows.data_ptr(),
            top=self.top.data_ptr(),
            odds=self.odds.data_ptr(),
            second=self.second.data_ptr(),
            out=out.data_ptr(),
            power=power,
            complement=complement,
            samples=samples,
            classes=classes,
            z_sample=rows.stride(0),
            narrow=rows.dtype == torch.float32,
        )
        library.softmax_powers(ctypes.byref(job), parallel_runner(), torch.get_num_threads())
        return out
