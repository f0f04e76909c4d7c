"""Draws the figures of a run from its results, without Lightning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lightning_gradmetrics.evaluation import evaluate
from lightning_gradmetrics.pictures import PictureSource, curve_pictures, pixels_of, write_pictures

__all__ = ["Curves", "Drawn", "Figures", "matplotlib_settings"]


@dataclass(frozen=True)
class Curves:
    """The data of the curves.

    Args:
        results: The per-sample table.
        scores: The scores that are detectors.
        roles: The role of each dataset.
    """

    results: pa.Table
    scores: Sequence[str]
    roles: Mapping[str, str]


@dataclass(frozen=True)
class Drawn:
    """The figures of a run.

    Args:
        files: The files of the pictures of the sources and their captions, as
            :func:`~lightning_gradmetrics.pictures.write_pictures` returns them.
        pixels: The pixels of these pictures ``(H, W, 3)`` by name, if they were wanted.
    """

    files: list[dict[str, str]]
    pixels: dict[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class Figures:
    """The data of all figures of a run; a call draws and saves them. Both can be done in different processes.

    Args:
        directory: The directory whose folder ``figures`` gets the files.
        sources: The sources of pictures.
        curves: The data of the curves; ``None`` for no curves.
        with_pixels: Whether to return the pixels of the pictures of the sources.
        settings: The settings of Matplotlib.
    """

    directory: Path
    sources: Sequence[PictureSource]
    curves: Curves | None = None
    with_pixels: bool = False
    settings: Mapping[Any, Any] = field(default_factory=dict)

    def __call__(self) -> Drawn:
        """Draw and save the figures."""
        with matplotlib.rc_context(dict(self.settings)):
            pictures = []
            for source in self.sources:
                pictures += source.pictures()
            pixels = {}
            if self.with_pixels:
                pixels = {picture.name: pixels_of(picture.figure) for picture in pictures}
            files = write_pictures(pictures, self.directory)
            if self.curves is not None:
                self._write_curves(self.curves)
        return Drawn(files, pixels)

    def _write_curves(self, curves: Curves) -> None:
        evaluation = evaluate(curves.results, curves.scores, curves.roles, resamples=0)
        write_pictures(curve_pictures(curves.results, evaluation), self.directory, pdf=True)


def matplotlib_settings() -> dict[Any, Any]:
    """Return Matplotlib's settings, except the backend: the format of a file determines it."""
    settings: dict[Any, Any] = {}
    for name in matplotlib.rcParams:
        if name != "backend":
            settings[name] = matplotlib.rcParams[name]
    return settings
