"""Maps of a limited number of images, stored during a run and written as arrays and as pictures by rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_gradmetrics.pictures.base import picture_path

__all__ = ["KeptMaps", "by_rank", "write_maps"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class KeptMaps:
    """The maps of one image.

    Args:
        dataset: The name of the dataset.
        index: The index of the image in the dataset.
        value: The score of the image, by which it was chosen.
        prediction: ``(H, W)``.
        labels: ``(H, W)``, negative if unknown, or ``None``.
        scores: ``(H, W)`` each, float16.
        image: ``(3, H, W)``, or ``None``.
    """

    dataset: str
    index: int
    value: float
    prediction: Array
    labels: Array | None
    scores: Mapping[str, Array]
    image: Array | None = None


def by_rank(values: Array) -> Array:
    """Return the fraction of pixels with a lower value, ``(H, W)`` in [0, 1], so that every colour covers an equal area.

    Example:
        >>> by_rank(np.array([[1.0, 100.0], [2.0, 3.0]])).tolist()
        [[0.0, 1.0], [0.3333333333333333, 0.6666666666666666]]
    """
    flat = np.asarray(values, np.float64).ravel()
    ordered = np.sort(flat)
    ranks = np.searchsorted(ordered, flat).astype(np.float64)
    return (ranks / max(1, len(flat) - 1)).reshape(values.shape)


def write_maps(maps: KeptMaps, directory: Path) -> list[Path]:
    """Write the maps of one image: ``<dataset>_<index>.npz``, and one PNG with all maps side by side.

    The arrays are ``prediction``, ``labels`` if known, and each score in float16.

    Args:
        maps: The maps.
        directory: The directory to write to; it is created if it is missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stem = picture_path(f"{maps.dataset}_{maps.index}".replace("/", "_"))
    arrays: dict[str, Array] = {"prediction": maps.prediction, **maps.scores}
    if maps.labels is not None:
        arrays["labels"] = maps.labels
    path = directory / f"{stem}.npz"
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    picture = directory / f"{stem}.png"
    figure = figure_of(maps)
    figure.savefig(picture, dpi=120)
    return [path, picture]


def figure_of(maps: KeptMaps) -> Any:
    """Return a figure with the image, the prediction, the wrong pixels, and each score by rank."""
    from matplotlib.figure import Figure

    panels = list(_panels(maps))
    figure = Figure(figsize=(3.2 * len(panels), 3.0), layout="constrained")
    for position, (title, values, options) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), position + 1)
        axes.imshow(values, interpolation="nearest", **options)
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    return figure


def _panels(maps: KeptMaps) -> Any:
    if maps.image is not None:
        yield "image", maps.image.transpose(1, 2, 0), {}
    yield "prediction", maps.prediction, {"cmap": "tab20", "vmin": 0, "vmax": 19}
    if maps.labels is not None:
        wrong = np.where(maps.labels < 0, 0.5, (maps.labels != maps.prediction).astype(float))
        yield "wrong (grey: ignored)", wrong, {"cmap": "gray", "vmin": 0, "vmax": 1}
    for name, values in maps.scores.items():
        yield f"{name}, by rank", by_rank(values), {"cmap": "inferno", "vmin": 0, "vmax": 1}


def picture_of(image: Tensor) -> Array:
    """Return an input image as ``(3, H, W)`` in [0, 1], stretched between its extremes."""
    pixels = image.detach().float().cpu().nan_to_num()
    pixels = pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels[:3]
    low, high = pixels.amin(), pixels.amax()
    stretched: Array = ((pixels - low) / (high - low).clamp(min=1e-12)).numpy()
    return stretched


def half(values: Tensor) -> Array:
    """Return a map in float16, on the CPU."""
    array: Array = values.detach().to(torch.float16).cpu().numpy()
    return array
