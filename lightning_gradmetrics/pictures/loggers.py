"""Sends pictures and per-sample scores to the loggers of a Trainer, in a form that each supports."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lightning_gradmetrics.pictures.base import Picture, settle_layout
from lightning_gradmetrics.pictures.examples import ExampleGallery, displayed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["log_pictures", "log_pixels", "log_samples", "pixels_of", "takes_pixels"]

MOST_ROWS = 10_000
"""Largest number of rows in a table that is sent to a logger."""


def log_pictures(loggers: Sequence[Any], pictures: Iterable[Picture], prefix: str, step: int) -> None:
    """Send pictures to every logger, and warn about loggers that support none.

    W&B and TensorBoard receive images, and MLflow receives figures as artifacts. For a logger with a local folder, such
    as ``CSVLogger``, PNG files are written to its folder ``figures``.

    Args:
        loggers: The loggers.
        pictures: The pictures.
        prefix: The prefix of their names.
        step: The global step.
    """
    drawn = list(pictures)
    for logger in loggers:
        if not all(_log_picture(logger, picture, prefix, step) for picture in drawn):
            name = type(logger).__name__
            warnings.warn(
                f"{name} gets no pictures: it has no log_image, experiment.add_image, experiment.log_figure or log_dir",
                stacklevel=2,
            )


def _log_picture(logger: Any, picture: Picture, prefix: str, step: int) -> bool:
    """Log a picture, and return whether the logger supports pictures."""
    if takes_pixels(logger):
        log_pixels([logger], {picture.name: pixels_of(picture.figure)}, prefix, step)
        return True
    experiment: Any = getattr(logger, "experiment", None)
    tag = f"{prefix}/{picture.name}"
    settle_layout(picture.figure)
    if hasattr(experiment, "log_figure") and getattr(logger, "run_id", None):
        experiment.log_figure(logger.run_id, picture.figure, f"{tag}/{step}.png")  # type: ignore[union-attr]
    elif isinstance(getattr(logger, "log_dir", None), (str, Path)):
        path = Path(logger.log_dir) / "figures" / f"{picture.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png(picture.figure))
    else:
        return False
    return True


def takes_pixels(logger: Any) -> bool:
    """Return whether a logger receives pictures as arrays of pixels, as those of W&B and TensorBoard do."""
    return hasattr(logger, "log_image") or hasattr(getattr(logger, "experiment", None), "add_image")


def log_pixels(loggers: Sequence[Any], pixels: Mapping[str, NDArray[np.uint8]], prefix: str, step: int) -> None:
    """Send the pixels of pictures to loggers that take them, and let TensorBoard write them.

    Args:
        loggers: The loggers; :func:`takes_pixels` is true for each.
        pixels: The pixels ``(H, W, 3)`` of each picture, by name.
        prefix: The prefix of their names.
        step: The global step.
    """
    for logger in loggers:
        for name, image in pixels.items():
            if hasattr(logger, "log_image"):
                logger.log_image(key=f"{prefix}/{name}", images=[image], step=step)
            else:
                logger.experiment.add_image(f"{prefix}/{name}", image, step, dataformats="HWC")
        if pixels and hasattr(getattr(logger, "experiment", None), "flush"):
            logger.experiment.flush()


def pixels_of(figure: Figure) -> NDArray[np.uint8]:
    """Return the pixels of a figure ``(height, width, 3)``, bytes."""
    settle_layout(figure)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def log_samples(
    loggers: Sequence[Any], results: pa.Table, scores: Mapping[str, str], sources: Sequence[Any], prefix: str, step: int
) -> None:
    """Log the per-sample scores as histograms in TensorBoard and as tables in W&B; other loggers support neither.

    Args:
        loggers: The loggers.
        results: The per-sample table.
        scores: The name of each score in the logger, by its column.
        sources: The picture sources; their examples become a table with images.
        prefix: The prefix of the names.
        step: The global step.
    """
    for logger in loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_histogram"):
            for dataset, column, values in _columns(results, scores):
                experiment.add_histogram(f"{prefix}/{dataset}/{scores[column]}", values, step)  # type: ignore[union-attr]
        if hasattr(logger, "log_table"):
            shown = results.slice(0, MOST_ROWS)
            logger.log_table(key=f"{prefix}/results", dataframe=shown.to_pandas(), step=step)
            _log_examples(logger, sources, f"{prefix}/largest", step)


def _columns(results: pa.Table, scores: Mapping[str, str]) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """Yield the finite values of each score on each dataset with such values."""
    for dataset in pc.unique(results["dataset"]).to_pylist():
        rows = results.filter(pc.equal(results["dataset"], dataset))
        for column in scores:
            values = rows[column].to_numpy()
            if np.isfinite(values).any():
                yield dataset, column, values[np.isfinite(values)]


def _log_examples(logger: Any, sources: Sequence[Any], key: str, step: int) -> None:
    """Log the samples with the largest scores as a W&B table with images."""
    rows = []
    for source in sources:
        if isinstance(source, ExampleGallery):
            rows += list(source.rows())
    if rows:
        import wandb

        columns = ["dataset", "score", "value", "index", "label", "prediction", "image"]
        data = []
        for *numbers, image in rows:
            data.append([*numbers, wandb.Image(displayed(image))])
        logger.log_table(key=key, columns=columns, data=data, step=step)
