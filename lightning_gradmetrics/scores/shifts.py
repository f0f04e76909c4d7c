"""Augmented views of images: reflect-padded shifts and flips."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["shifted_views", "views_of"]

SHIFT = 16
"""Images are shifted by up to their size divided by this number, or by one pixel if that is larger."""


def shifted_views(images: Tensor, n: int, seed: int = 0, flip: bool = True) -> list[Tensor]:
    """Return the images and n - 1 copies, shifted by up to a sixteenth of their size and every other one flipped.

    Args:
        images: ``(N, C, H, W)``; the border is filled by reflection.
        n: The number of views.
        seed: The seed of the shifts.
        flip: Whether every other copy is flipped.

    Example:
        >>> [tuple(view.shape) for view in shifted_views(torch.randn(2, 3, 8, 8), 3)]
        [(2, 3, 8, 8), (2, 3, 8, 8), (2, 3, 8, 8)]
    """
    height, width = images.shape[2:]
    down, across = max(1, height // SHIFT), max(1, width // SHIFT)
    padded = F.pad(images, (across, across, down, down), mode="reflect")
    generator = torch.Generator().manual_seed(seed)
    shifted = [images]
    for number in range(1, n):
        top = int(torch.randint(2 * down + 1, (), generator=generator))
        left = int(torch.randint(2 * across + 1, (), generator=generator))
        view = padded[:, :, top : top + height, left : left + width]
        shifted.append(view.flip(3) if flip and number % 2 else view)
    return shifted


def views_of(inputs: Tensor, n: int, seed: int = 0, flip: bool = True) -> list[Tensor]:
    """Return n views of inputs: the inputs themselves, and for n above 1 the copies of :func:`shifted_views`.

    Args:
        inputs: ``(N, ...)``; images ``(N, C, H, W)`` for n above 1.
        n: The number of views.
        seed: The seed of the shifts.
        flip: Whether every other copy is flipped.

    Raises:
        TypeError: If n is above 1 and the inputs are not images.

    Example:
        >>> len(views_of(torch.randn(2, 5), 1)), len(views_of(torch.randn(2, 3, 8, 8), 4))
        (1, 4)
    """
    if n == 1:
        return [inputs]
    if inputs.ndim != 4:
        raise TypeError(
            f"views are shifted and flipped images (N, C, H, W), and these inputs have shape {tuple(inputs.shape)}: take "
            "one view, or pass transforms= to views, a function from inputs to a list of views"
        )
    return shifted_views(inputs, n, seed, flip)
