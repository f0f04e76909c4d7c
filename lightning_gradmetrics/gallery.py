"""Pictures of cosine similarity maps, collected while a run scores: a few samples and the mean of each data set."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradmetrics.evidence import Evidence
from lightning_gradmetrics.scores.geometry import ClassCosines
from lightning_gradmetrics.scores.registry import Score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MapGallery", "Picture", "log_pictures", "write_pictures"]


@dataclass(frozen=True)
class Picture:
    """A figure with its words; ``name`` is that of its file and of its tag in a logger."""

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass
class _Seen:
    """What is kept of one data set: the sum of its maps, and the extreme samples, the least uncertain first."""

    count: int = 0
    total: Tensor | None = None
    values: Tensor = field(default_factory=lambda: torch.zeros(0))
    maps: Tensor | None = None
    images: Tensor | None = None

    def add(self, values: Tensor, maps: Tensor, images: Tensor | None, each: int) -> None:
        """Add samples and keep the ``each`` lowest and highest."""
        self.count += len(values)
        total = maps.sum(0, dtype=torch.float64)
        self.total = total if self.total is None else self.total + total
        self.values = torch.cat([self.values, values])
        order = self.values.argsort(stable=True)
        kept = order if len(order) <= 2 * each else torch.cat([order[:each], order[-each:]])
        self.maps = (maps if self.maps is None else torch.cat([self.maps, maps]))[kept]
        if images is not None:
            self.images = (images if self.images is None else torch.cat([self.images, images]))[kept]
        self.values = self.values[kept]


@dataclass
class MapGallery:
    """The maps that a score of geometric gradient analysis computed anyway.

    Args:
        score: The score that ranks the samples.
        probe: Its maps.
        each: Samples kept of each end of the ranking, in each data set.
    """

    score: Score
    probe: ClassCosines
    each: int = 3
    seen: dict[str, _Seen] = field(default_factory=dict)

    @classmethod
    def of(cls, scores: Iterable[Score]) -> MapGallery | None:
        """Of the first score that looks at cosine similarity maps, or ``None``."""
        for score in scores:
            for probe in score.needs.probes:
                if isinstance(probe, ClassCosines):
                    return cls(score, probe)
        return None

    def add(self, dataset: str, inputs: Any, evidence: Evidence, scores: Mapping[str, Tensor]) -> None:
        """Look at a batch; samples with NaN are left out."""
        maps, values = evidence.probes[self.probe].detach(), scores[self.score.name].detach()
        finite = maps.flatten(1).isfinite().all(1) & values.isfinite()
        images = inputs.detach() if isinstance(inputs, Tensor) and inputs.ndim == 4 else None
        if images is not None and images.shape[1] not in (1, 3):
            images = None
        if finite.any():
            kept = None if images is None else images[finite.to(images.device)].float().cpu()
            self.seen.setdefault(dataset, _Seen()).add(
                values[finite].double().cpu(), maps[finite].float().cpu(), kept, self.each
            )

    def pictures(self) -> list[Picture]:
        """The mean map of each data set in one figure, and a figure a data set of its extreme samples."""
        if not self.seen:
            return []
        return [self._means(), *(self._samples(name, seen) for name, seen in self.seen.items())]

    def _means(self) -> Picture:
        from lightning_gradmetrics.plots import csm_figure

        means = torch.stack([seen.total / seen.count for seen in self.seen.values() if seen.total is not None])
        titles = [f"{name} ({seen.count})" for name, seen in self.seen.items()]
        caption = "The mean over each data set's samples, whose number is in brackets."
        return Picture(
            "mean_maps", "Mean cosine similarity maps", f"{self._axes()} {caption}", csm_figure(means, titles=titles)
        )

    def _samples(self, name: str, seen: _Seen) -> Picture:
        from lightning_gradmetrics.plots import csm_figure

        assert seen.maps is not None
        titles = [f"{value:.3g}" for value in seen.values.tolist()]
        figure = csm_figure(seen.maps, images=seen.images, titles=titles, columns=2 * self.each)
        caption = (
            f"By {self.score.name}, the number above each: from the most certain samples to the most uncertain ones."
        )
        title = f"Cosine similarity maps of {name}"
        return Picture(f"maps_{_plain(name)}", title, f"{self._axes()} {caption}", figure)

    def _axes(self) -> str:
        what = "Classes" if self.probe.classes is None else "Each sample's classes of largest logit, largest first,"
        return f"{what} against each other: the cosine of their saliency maps, red where they agree."


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


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
        ``file`` (relative to the directory), ``title`` and ``caption`` of each, for ``metrics.json``.
    """
    import matplotlib

    records = []
    for picture in pictures:
        file = Path("figures") / f"{picture.name}.svg"
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": picture.name}):
            picture.figure.savefig(directory / file, metadata={"Date": None})
        records.append({"file": file.as_posix(), "title": picture.title, "caption": picture.caption})
    return records
