"""Pictures of a run: what makes them, while the run scores, and where they go."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.csv
from torch import Tensor

from lightning_gradmetrics.classifier.forward import Inputs, map_tensors
from lightning_gradmetrics.scoring.evidence import Evidence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Picture",
    "PictureSource",
    "ScoredBatch",
    "file_name",
    "images_of",
    "log_pictures",
    "write_pictures",
    "write_tables",
]


@dataclass(frozen=True)
class Picture:
    """A figure with its words; ``name`` is that of its file and of its tag in a logger, ``section`` its place in a report."""

    name: str
    title: str
    caption: str
    figure: Figure
    section: str = "Pictures"


@dataclass(frozen=True)
class ScoredBatch:
    """A batch after it was scored, as a picture source sees it.

    Args:
        dataset: The data set's name.
        index: Each sample's index in it ``(N,)``; -1 where a distributed sampler repeats one.
        prediction: The predicted classes ``(N,)``.
        label: The true labels ``(N,)``, -1 where unknown.
        finite: Which samples are free of NaN and Inf, in input, logits and scores ``(N,)``.
        inputs: The model's inputs.
        evidence: What the scores looked at.
        scores: The scores by name, ``(N,)`` each.
    """

    dataset: str
    index: Tensor
    prediction: Tensor
    label: Tensor
    finite: Tensor
    inputs: Inputs | None
    evidence: Evidence
    scores: Mapping[str, Tensor]

    def once(self) -> ScoredBatch:
        """The batch without the samples that a distributed sampler repeats."""
        keep = self.index >= 0
        if keep.all():
            return self
        size, keep = len(keep), keep.to(self.prediction.device)

        def take(tensor: Tensor) -> Tensor:
            return tensor[keep.to(tensor.device)] if tensor.ndim and len(tensor) == size else tensor

        return replace(
            self,
            index=take(self.index),
            prediction=take(self.prediction),
            label=take(self.label),
            finite=take(self.finite),
            inputs=map_tensors(self.inputs, take),
            evidence=self.evidence.rows(keep),
            scores={name: take(values) for name, values in self.scores.items()},
        )


class PictureSource(Protocol):
    """Looks at the batches that a run scores, keeps a bounded part of what it sees, and makes pictures of it."""

    def look(self, evidence: Evidence) -> Any:
        """Ask the evidence for what :meth:`add` will: as with a score, the dry run of it is the declaration."""

    def add(self, batch: ScoredBatch) -> None:
        """Look at a batch, in which no sample is repeated."""

    def kept(self) -> Any:
        """What was kept: what processes send each other."""

    def join(self, parts: Sequence[Any]) -> None:
        """Take what all processes kept for what was kept."""

    def pictures(self) -> list[Picture]:
        """The pictures."""

    def tables(self) -> dict[str, pa.Table]:
        """The numbers in them, by the name of their file."""


def images_of(inputs: Inputs | None) -> Tensor | None:
    """The inputs where they are images, ``(N, 1 or 3, H, W)``; else ``None``.

    Example:
        >>> import torch
        >>> images_of(torch.zeros(2, 3, 8, 8)).shape, images_of(torch.zeros(2, 7))
        (torch.Size([2, 3, 8, 8]), None)
    """
    images = isinstance(inputs, Tensor) and inputs.ndim == 4 and inputs.shape[1] in (1, 3)
    return inputs.detach() if images else None  # type: ignore[union-attr]


def file_name(text: str) -> str:
    """The text as a part of a file's name.

    Example:
        >>> file_name("photos/far (2)")
        'photos_far_2_'
    """
    return re.sub(r"[^\w.-]+", "_", text)


def log_pictures(loggers: Sequence[Any], pictures: Iterable[Picture], prefix: str, step: int) -> None:
    """Hand pictures to the loggers that take them, by ``log_image`` (W&B) or ``experiment.add_image`` (TensorBoard)."""
    for picture in pictures:
        pixels = None
        for logger in loggers:
            tag = f"{prefix}/{picture.name}"
            takes = hasattr(logger, "log_image") or hasattr(logger.experiment, "add_image")
            if takes and pixels is None:
                pixels = _pixels(picture.figure)
            if hasattr(logger, "log_image"):
                logger.log_image(key=tag, images=[pixels], step=step)
            elif takes:
                logger.experiment.add_image(tag, pixels, step, dataformats="HWC")


def _pixels(figure: Figure) -> Any:
    """``(height, width, 3)``, bytes."""
    import numpy as np

    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]


def write_pictures(pictures: Iterable[Picture], directory: Path) -> list[dict[str, str]]:
    """Write each picture to ``directory/figures/<name>.svg``, the same file each time.

    Returns:
        ``file`` (relative to the directory), ``title``, ``caption`` and ``section`` of each, for ``metrics.json``.
    """
    import matplotlib

    records = []
    for picture in pictures:
        file = Path("figures") / f"{picture.name}.svg"
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": picture.name}):
            picture.figure.savefig(directory / file, metadata={"Date": None})
        words = {"title": picture.title, "caption": picture.caption, "section": picture.section}
        records.append({"file": file.as_posix(), **words})
    return records


def write_tables(tables: Mapping[str, pa.Table], directory: Path) -> list[Path]:
    """Write each table to ``directory/<name>.csv``, and give the files' paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{name}.csv" for name in tables]
    for path, table in zip(paths, tables.values(), strict=True):
        pa.csv.write_csv(table, path)
    return paths
