"""Images and their label maps in two folders, paired by file name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightning_gradmetrics.cli.data.folders import SUFFIXES
from lightning_gradmetrics.cli.errors import unknown_name

__all__ = ["LabelledImages", "chosen_rows"]

ROWS = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}


def chosen_rows(rows: str) -> slice:
    """Return the slice for ``all``, ``even`` or ``odd`` rows.

    Raises:
        ValueError: If it is any other word.

    Example:
        >>> [10, 11, 12][chosen_rows("even")]
        [10, 12]
    """
    if rows not in ROWS:
        raise ValueError(unknown_name("rows", rows, ROWS))
    return ROWS[rows]


class LabelledImages(Dataset[tuple[Tensor, Tensor]]):
    """The images of a folder ``(3, H, W)`` with the label maps of another ``(H, W)``, in the order of their names.

    Args:
        images: The folder of the images.
        labels: The folder of the label maps: images of one channel, whose values are classes, under the same names.
        channels: The order of channels that the model expects: ``"rgb"`` or ``"bgr"``.
        largest: The largest value of a channel: 255 or 1.
        mean: Subtracted from each channel.
        std: Each channel is divided by it.
        rows: ``"all"``, ``"even"`` or ``"odd"`` positions of the sorted files.

    Raises:
        FileNotFoundError: If a folder is missing or has no image, or an image has no label map.
        ValueError: If ``channels`` or ``rows`` is any other word.
    """

    def __init__(
        self,
        images: str | Path,
        labels: str | Path,
        channels: Literal["rgb", "bgr"] = "rgb",
        largest: float = 1.0,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
        rows: str = "all",
    ) -> None:
        if channels not in ("rgb", "bgr"):
            raise ValueError(unknown_name("channels", channels, ("rgb", "bgr")))
        self.channels, self.largest = channels, largest
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        by_stem = {path.stem: path for path in _images(labels)}
        self.pairs: list[tuple[Path, Path]] = []
        for image in _images(images)[chosen_rows(rows)]:
            if image.stem not in by_stem:
                raise FileNotFoundError(
                    f"{str(image)!r} has no label map: expected a file {image.stem}.* in {str(labels)!r}"
                )
            self.pairs.append((image, by_stem[image.stem]))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = self.pairs[index]
        with Image.open(image) as file:
            pixels = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
        with Image.open(labels) as file:
            classes = torch.from_numpy(np.array(file)).long()
        if classes.ndim != 2:
            raise ValueError(
                f"{str(labels)!r} has {classes.shape[2]} channels; expected one, with the class of each pixel"
            )
        if self.channels == "bgr":
            pixels = pixels.flip(0)
        return (pixels.float() * (self.largest / 255) - self.mean) / self.std, classes


def _images(folder: str | Path) -> list[Path]:
    path = Path(folder).expanduser()
    files = sorted(file for file in path.glob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"no images in {str(folder)!r}: give the path of a folder with files such as *.png")
    return files
