"""Linear maps from a head's output to the logits of a segmentation model: reflecting, resizing and cropping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["IDENTITY", "Carry", "difference_of", "find_carry"]

LINEAR_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
FACTORS = (2, 4, 8, 16, 32)
"""Enlargement factors that are tried for maps that are cropped afterwards."""


@dataclass(frozen=True)
class Carry:
    """Reflects, resizes and crops maps from the head's grid to the logits' grid, in the same way for each channel.

    Args:
        flips: The axes that are reflected first.
        size: The size to resize to; ``None`` does not resize.
        mode: The mode of :func:`torch.nn.functional.interpolate`.
        align_corners: As in that function.
        antialias: As in that function.
        crop: For every axis the offset and the size of the kept region; ``None`` keeps all.

    Example:
        >>> Carry(size=(4, 4), mode="bilinear", align_corners=False)(torch.zeros(2, 3, 2, 2)).shape
        torch.Size([2, 3, 4, 4])
    """

    flips: tuple[int, ...] = ()
    size: tuple[int, ...] | None = None
    mode: str = "nearest"
    align_corners: bool | None = None
    antialias: bool = False
    crop: tuple[tuple[int, int], ...] | None = None

    @property
    def selects(self) -> bool:
        """Whether every position of the result is one position of the input, unchanged."""
        return self.size is None or self.mode in ("nearest", "nearest-exact")

    @property
    def is_nonnegative(self) -> bool:
        """Whether all weights are at least zero."""
        return self.mode != "bicubic"

    def __call__(self, x: Tensor) -> Tensor:
        """Return the carried maps ``(N, D, *P)``."""
        if self.flips:
            x = x.flip([2 + axis for axis in self.flips])
        if self.size is not None:
            x = F.interpolate(x, self.size, mode=self.mode, align_corners=self.align_corners, antialias=self.antialias)
        for axis, (start, length) in enumerate(self.crop or ()):
            x = x.narrow(2 + axis, start, length)
        return x


IDENTITY = Carry()


def difference_of(first: Tensor, second: Tensor) -> float:
    """Return the largest difference of two maps relative to the expected rounding error; infinite if shapes differ.

    NaN and Inf are equal to themselves.
    """
    if first.shape != second.shape:
        return float("inf")
    if torch.equal(first, second):
        return 0.0
    narrow = min((first.dtype, second.dtype), key=_digits)
    same = (first == second) | (first.isnan() & second.isnan())
    error = (first.double() - second.double()).abs().masked_fill(same, 0)
    if not bool(error.isfinite().all()):
        return float("inf")
    size = second.double().abs().nan_to_num(0, 0, 0).amax().clamp(min=1e-30)
    factor = 64.0 if narrow in (torch.float32, torch.float64) else 4.0
    return float(error.amax() / (factor * torch.finfo(narrow).eps * size))


def _digits(dtype: torch.dtype) -> float:
    return -torch.finfo(dtype).eps


def find_carry(z: Tensor, logits: Tensor, hint: Carry | None = None) -> Carry | None:
    """Return the map that turns a head's output into the logits, found by trying; ``None`` if there is none.

    Args:
        z: The head's output ``(N, C, *Q)``.
        logits: The logits that the model returned ``(N, C, *P)``.
        hint: The map found for an earlier batch, which is tried first.

    Example:
        >>> z = torch.randn(1, 3, 4, 4)
        >>> find_carry(z, F.interpolate(z, (7, 9), mode="bilinear")).mode
        'bilinear'
    """
    if z.shape[:2] != logits.shape[:2] or z.ndim != logits.ndim:
        return None
    if hint is not None:
        adapted = _adapted(hint, logits)
        if difference_of(_attempt(adapted, z), logits) <= 1:
            return adapted
    best, least = None, 1.0
    for carry in _candidates(z, logits):
        difference = difference_of(_attempt(carry, z), logits)
        if difference == 0:
            return carry
        if difference <= least:
            best, least = carry, difference
    return best


def _adapted(hint: Carry, logits: Tensor) -> Carry:
    """Return the map for logits of a different size."""
    if hint.crop is not None or hint.size is None:
        return hint
    return replace(hint, size=tuple(logits.shape[2:]))


def _attempt(carry: Carry, z: Tensor) -> Tensor:
    """Return the carried map; an empty tensor where the map cannot be applied."""
    try:
        return carry(z)
    except (RuntimeError, NotImplementedError, ValueError):
        return z.new_empty(0)


def _candidates(z: Tensor, logits: Tensor) -> Iterator[Carry]:
    have, wanted = tuple(z.shape[2:]), tuple(logits.shape[2:])
    if have == wanted:
        yield IDENTITY
        return
    yield from _crops(IDENTITY, z, logits)
    for resize in _resizes(len(wanted)):
        yield replace(resize, size=wanted)
    for factor in FACTORS:
        large = tuple(factor * size for size in have)
        if large != wanted and _contains(large, wanted):
            for resize in _resizes(len(wanted)):
                enlarged = replace(resize, size=large)
                yield from _crops(enlarged, _attempt(enlarged, z), logits)


def _contains(large: tuple[int, ...], small: tuple[int, ...]) -> bool:
    return all(a >= b for a, b in zip(large, small, strict=True))


def _resizes(axes: int) -> Iterator[Carry]:
    linear = LINEAR_MODES.get(axes)
    if linear is None:
        return
    yield Carry(mode=linear, align_corners=False)
    yield Carry(mode=linear, align_corners=True)
    yield Carry(mode="nearest")
    yield Carry(mode="nearest-exact")
    yield Carry(mode="area")
    if axes == 2:
        yield Carry(mode="bicubic", align_corners=False)
        yield Carry(mode="bicubic", align_corners=True)
        yield Carry(mode="bilinear", align_corners=False, antialias=True)
        yield Carry(mode="bicubic", align_corners=False, antialias=True)


def _crops(carry: Carry, z: Tensor, logits: Tensor) -> Iterator[Carry]:
    """Yield the crops of a larger map whose first values are those of the logits."""
    have, wanted = z.shape[2:], logits.shape[2:]
    if z.ndim != logits.ndim or not _contains(tuple(have), tuple(wanted)):
        return
    for offsets in _matching_offsets(z[0], logits[0]).nonzero().tolist():
        yield replace(carry, crop=tuple(zip(offsets, wanted, strict=True)))


def _matching_offsets(z: Tensor, logits: Tensor) -> Tensor:
    """Return the crop offsets at which the map agrees with the logits at the corners and in the middle, up to rounding.

    Args:
        z: The larger map ``(C, *Q)``.
        logits: ``(C, *P)``.
    """
    lengths = [large - small + 1 for large, small in zip(z.shape[1:], logits.shape[1:], strict=True)]
    eps = max(torch.finfo(z.dtype).eps, torch.finfo(logits.dtype).eps)
    margin = 64 * eps * logits.abs().amax().clamp(min=1e-30)
    agrees = torch.ones(lengths, dtype=torch.bool, device=z.device)
    for share in (0.0, 0.5, 1.0):
        window, point = z, logits
        for axis, (length, small) in enumerate(zip(lengths, logits.shape[1:], strict=True)):
            start = round(share * (small - 1))
            window, point = window.narrow(1 + axis, start, length), point.narrow(1 + axis, start, 1)
        agrees &= ((window - point).abs() <= margin).all(0)
    return agrees
