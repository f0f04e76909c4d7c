"""Results of a segmentation model besides the rows of its images: segments, pixel metrics and maps."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from lightning_gradmetrics.pictures.pixels.settings import Pixels
from lightning_gradmetrics.pictures.pixels.source import PixelResults
from lightning_gradmetrics.results.segments import segment_table

__all__ = ["PixelOutcome"]


class PixelOutcome:
    """The part of the callback that presents segments, pixel metrics and maps."""

    pixels: Pixels
    results: pa.Table
    _pixels: PixelResults

    @property
    def segments(self) -> pa.Table:
        """The predicted segments, one per row, with class, size, box, IoU, error and mean scores.

        With ``output=`` they are read from the directory.
        """
        return segment_table(self.results, self.pixels.class_names)

    @property
    def pixel_metrics(self) -> pa.Table:
        """The metrics of pixels, images and segments, with one row per unit, dataset, task, score, metric and kind of pooling.

        ``low`` and ``high`` are the ends of the 95 % interval over images. ``difference`` is the difference to the
        first score, with its paired interval.
        """
        return pa.Table.from_pylist(self._pixels.metrics())

    @property
    def class_metrics(self) -> pa.Table:
        """One row per dataset, task, score and predicted class, with its pixels, the fraction of positives, and the AUROC within it."""
        return pa.Table.from_pylist(self._pixels.by_class())

    def write_maps(self, directory: Path | str) -> list[Path]:
        """Write the maps of the images that ``pixels=Pixels(maps=...)`` keeps.

        Args:
            directory: The directory; it is created if it is missing.

        Returns:
            For each image a ``.npz`` file with its arrays, and a PNG with all maps, scores coloured by rank.
        """
        return self._pixels.write_maps(directory)
