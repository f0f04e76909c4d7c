"""Cosine similarity maps of a run: the mean of each data set, and a few samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import torch
from torch import Tensor

from lightning_gradmetrics.pictures.base import Picture, ScoredBatch, file_name, images_of
from lightning_gradmetrics.scores.geometry import ClassCosines
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.registry import Score

__all__ = ["MapGallery"]


@dataclass
class _Seen:
    """Samples of one data set: how many there were, the sum of their maps, and those that are kept."""

    count: int
    total: Tensor
    values: Tensor
    maps: Tensor
    images: Tensor | None

    @classmethod
    def of(cls, values: Tensor, maps: Tensor, images: Tensor | None) -> _Seen:
        """All samples of a batch."""
        return cls(len(values), maps.sum(0, dtype=torch.float64), values, maps, images)

    def extremes(self, each: int) -> _Seen:
        """Keep the ``each`` lowest and highest, the lowest first."""
        order = self.values.argsort(stable=True)
        kept = order if len(order) <= 2 * each else torch.cat([order[:each], order[-each:]])
        images = None if self.images is None else self.images[kept]
        return _Seen(self.count, self.total, self.values[kept], self.maps[kept], images)


def _joined(parts: Sequence[_Seen], each: int) -> _Seen:
    images = [part.images for part in parts if part.images is not None]
    return _Seen(
        sum(part.count for part in parts),
        torch.stack([part.total for part in parts]).sum(0),
        torch.cat([part.values for part in parts]),
        torch.cat([part.maps for part in parts]),
        torch.cat(images) if len(images) == len(parts) else None,
    ).extremes(each)


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

    def look(self, evidence: Evidence) -> Tensor:
        """The maps."""
        size = self.probe.classes or evidence.logits.shape[1]
        return evidence.probe(self.probe, (size, size)).detach()

    def add(self, batch: ScoredBatch) -> None:
        """Look at a batch; samples with NaN are left out."""
        maps, values, images = self.look(batch.evidence), batch.scores[self.score.name], images_of(batch.inputs)
        finite = maps.flatten(1).isfinite().all(1) & values.isfinite()
        if not finite.any():
            return
        kept = None if images is None else images[finite.to(images.device)].float().cpu()
        found = _Seen.of(values.detach()[finite].cpu().double(), maps[finite].float().cpu(), kept)
        before = [self.seen[batch.dataset]] if batch.dataset in self.seen else []
        self.seen[batch.dataset] = _joined([*before, found], self.each)

    def kept(self) -> dict[str, _Seen]:
        """What is kept of each data set."""
        return self.seen

    def join(self, parts: Sequence[dict[str, _Seen]]) -> None:
        """The extreme samples and the mean over all processes."""
        names = dict.fromkeys(name for part in parts for name in part)
        self.seen = {name: _joined([part[name] for part in parts if name in part], self.each) for name in names}

    def tables(self) -> dict[str, pa.Table]:
        """None: the scores are in the results."""
        return {}

    def pictures(self) -> list[Picture]:
        """The mean map of each data set in one figure, and a figure a data set of its extreme samples."""
        if not self.seen:
            return []
        return [self._means(), *(self._samples(name, seen) for name, seen in self.seen.items())]

    def _means(self) -> Picture:
        from lightning_gradmetrics.pictures.cosine_map_figure import csm_figure

        means = torch.stack([seen.total / seen.count for seen in self.seen.values()])
        titles = [f"{name} ({seen.count})" for name, seen in self.seen.items()]
        caption = "The mean over each data set's samples, whose number is in brackets."
        return Picture(
            "mean_maps", "Mean cosine similarity maps", f"{self._axes()} {caption}", csm_figure(means, titles=titles)
        )

    def _samples(self, name: str, seen: _Seen) -> Picture:
        from lightning_gradmetrics.pictures.cosine_map_figure import csm_figure

        titles = [f"{value:.3g}" for value in seen.values.tolist()]
        figure = csm_figure(seen.maps, images=seen.images, titles=titles, columns=2 * self.each)
        caption = (
            f"By {self.score.name}, the number above each: from the most certain samples to the most uncertain ones."
        )
        title = f"Cosine similarity maps of {name}"
        return Picture(f"maps_{file_name(name)}", title, f"{self._axes()} {caption}", figure)

    def _axes(self) -> str:
        what = "Classes" if self.probe.classes is None else "Each sample's classes of largest logit, largest first,"
        return f"{what} against each other: the cosine of their saliency maps, red where they agree."
