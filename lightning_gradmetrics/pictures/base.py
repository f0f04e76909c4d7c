"""Pictures of a run: the interface of picture sources, and functions that write pictures."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pyarrow as pa
from torch import Tensor

from lightning_gradmetrics.classifier.forward import Inputs, map_tensors
from lightning_gradmetrics.scoring.evidence import Evidence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Key = TypeVar("Key")
Value = TypeVar("Value")

__all__ = [
    "Picture",
    "PictureSource",
    "ScoredBatch",
    "file_name",
    "grouped",
    "images_of",
    "settle_layout",
    "write_pictures",
]


@dataclass(frozen=True)
class Picture:
    """A figure with its title and caption.

    Args:
        name: Name of the file and of the tag in a logger.
        title: Heading in the report.
        caption: Text below the figure.
        figure: The matplotlib figure.
        section: Section of the report that shows the figure.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    section: str = "Pictures"


@dataclass(frozen=True)
class ScoredBatch:
    """A scored batch, as passed to picture sources.

    Args:
        dataset: Name of the dataset.
        index: Index of each sample in the dataset ``(N,)``; -1 for a sample that a distributed sampler repeats.
        prediction: Predicted classes ``(N,)``.
        label: True labels ``(N,)``, -1 if unknown.
        finite: Whether a sample has no NaN or Inf in its input, logits and scores ``(N,)``.
        inputs: The model's inputs.
        evidence: The evidence that the scores were computed from.
        scores: Values of each score ``(N,)``, by name.
        maps: Values of each score at every position ``(N, *P)``, or ``None`` if the model has no positions.
    """

    dataset: str
    index: Tensor
    prediction: Tensor
    label: Tensor
    finite: Tensor
    inputs: Inputs | None
    evidence: Evidence
    scores: Mapping[str, Tensor]
    maps: Mapping[str, Tensor] | None = None

    def without_repeats(self) -> ScoredBatch:
        """Return the batch without the samples that a distributed sampler repeats."""
        keep = self.index >= 0
        if keep.all():
            return self
        size, keep = len(keep), keep.to(self.prediction.device)

        def take(tensor: Tensor) -> Tensor:
            has_samples = tensor.ndim > 0 and len(tensor) == size
            return tensor[keep.to(tensor.device)] if has_samples else tensor

        maps = None
        if self.maps is not None:
            maps = {name: take(values) for name, values in self.maps.items()}
        return replace(
            self,
            index=take(self.index),
            prediction=take(self.prediction),
            label=take(self.label),
            finite=take(self.finite),
            inputs=map_tensors(self.inputs, take),
            evidence=self.evidence.rows(keep),
            scores={name: take(values) for name, values in self.scores.items()},
            maps=maps,
        )


class PictureSource(Protocol):
    """Reads every scored batch, stores a limited amount of data, and draws pictures at the end."""

    def look(self, evidence: Evidence) -> Any:
        """Request all evidence that :meth:`add` reads; the dry run of this method determines the needs."""

    def add(self, batch: ScoredBatch) -> None:
        """Read a batch, which contains no repeated samples."""

    def kept(self) -> Any:
        """Return the retained data, which processes exchange."""

    def join(self, parts: Sequence[Any]) -> None:
        """Replace the retained data by the data of all processes."""

    def pictures(self) -> list[Picture]:
        """Return the pictures."""

    def tables(self) -> dict[str, pa.Table]:
        """Return the tables behind the pictures, by file name without suffix."""


def grouped(mappings: Iterable[Mapping[Key, Value]]) -> dict[Key, list[Value]]:
    """Return the values of several mappings by key, in the order of the mappings.

    Example:
        >>> grouped([{"a": 1, "b": 2}, {"a": 3}])
        {'a': [1, 3], 'b': [2]}
    """
    groups: dict[Key, list[Value]] = {}
    for mapping in mappings:
        for key, value in mapping.items():
            groups.setdefault(key, []).append(value)
    return groups


def images_of(inputs: Inputs | None) -> Tensor | None:
    """Return the inputs if they are images ``(N, 1 or 3, H, W)``, else ``None``.

    Example:
        >>> import torch
        >>> images_of(torch.zeros(2, 3, 8, 8)).shape, images_of(torch.zeros(2, 7))
        (torch.Size([2, 3, 8, 8]), None)
    """
    if isinstance(inputs, Tensor) and inputs.ndim == 4 and inputs.shape[1] in (1, 3):
        return inputs.detach()
    return None


def file_name(text: str) -> str:
    """Return the text with underscores instead of characters that are unsafe in a file name.

    Example:
        >>> file_name("photos/far (2)")
        'photos_far_2_'
    """
    return re.sub(r"[^\w.-]+", "_", text)


def settle_layout(figure: Figure) -> None:
    """Compute the layout of a figure once: each file would compute it twice, which takes longer than drawing."""
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.execute(figure)
        figure.set_layout_engine("none")


def picture_path(name: str) -> PurePosixPath:
    """Return the path of a picture below the folder of figures, without its suffix.

    Folders of the name are kept. Characters that are unsafe in a file name become underscores, and a number from the name
    keeps such paths apart.

    Example:
        >>> str(picture_path("maps/test/3")), picture_path("../../x").parts[:2]
        ('maps/test/3', ('_', '_'))
    """
    parts = []
    for folder in name.split("/"):
        parts.append(file_name(folder).lstrip(".") or "_")
    safe = "/".join(parts)
    if safe == name:
        return PurePosixPath(safe)
    return PurePosixPath(f"{safe}-{zlib.crc32(name.encode()):08x}")


def write_pictures(pictures: Iterable[Picture], directory: Path, pdf: bool = False) -> list[dict[str, str]]:
    """Write each picture to ``directory/figures/<name>.svg``; equal pictures result in equal files.

    Args:
        pictures: The pictures.
        directory: The run directory.
        pdf: Whether to write each picture also as PDF.

    Returns:
        ``file`` (relative to the directory), ``title``, ``caption`` and ``section`` of each, for ``metrics.json``.
    """
    import matplotlib

    records = []
    for picture in pictures:
        settle_layout(picture.figure)
        file = Path("figures") / f"{picture_path(picture.name)}.svg"
        path, save = directory / file, picture.figure.savefig
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": picture.name}):
            save(path, metadata={"Date": None})
        if pdf:
            save(path.with_suffix(".pdf"), metadata={"CreationDate": None})
        words = {"title": picture.title, "caption": picture.caption, "section": picture.section}
        records.append({"file": file.as_posix(), **words})
    return records
