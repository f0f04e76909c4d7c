"""Converts an image to a model's input: resizes, crops, normalises."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_gradmetrics.cli.errors import unknown_name

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ImageTransform"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageTransform:
    """Turns an image into ``(3, size, size)``: RGB, the shorter side resized, the centre cropped, normalised.

    Args:
        size: Width and height of the result.
        resize: The length of the shorter side before the crop; ``None`` uses ``size``.
        interpolation: One of Pillow's filters: ``nearest``, ``bilinear``, ``bicubic`` or ``lanczos``.
        mean: Subtracted from each RGB channel, which is in [0, 1].
        std: Each channel is divided by it.

    Raises:
        ValueError: If the filter is unknown.
    """

    def __init__(
        self,
        size: int,
        resize: int | None = None,
        interpolation: str = "bicubic",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.size, self.resize = size, resize or size
        self.interpolation = _resampling(interpolation)
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the image as a tensor ``(3, size, size)``."""
        fitted = _fit(image.convert("RGB"), self.resize, self.size, self.interpolation)
        pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255
        return (pixels - self.mean) / self.std


def _resampling(name: str) -> Image.Resampling:
    known = {}
    for resampling in Image.Resampling:
        known[resampling.name.lower()] = resampling
    if name.lower() not in known:
        raise ValueError(unknown_name("interpolation", name, known))
    return known[name.lower()]


def _fit(image: Image.Image, resize: int, size: int, interpolation: Image.Resampling) -> Image.Image:
    """Resize the shorter side to ``resize`` and crop the centre, ``size`` wide and high."""
    width, height = image.size
    if min(width, height) != resize:
        scale = resize / min(width, height)
        image = image.resize((max(resize, round(width * scale)), max(resize, round(height * scale))), interpolation)
        width, height = image.size
    left, top = (width - size) // 2, (height - size) // 2
    return image if image.size == (size, size) else image.crop((left, top, left + size, top + size))
