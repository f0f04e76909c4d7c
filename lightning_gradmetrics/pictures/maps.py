"""Cosine similarity maps of a run: the mean of each dataset, and a few of its samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce

import pyarrow as pa
import torch
from torch import Tensor

from lightning_gradmetrics.pictures.base import Picture, ScoredBatch, file_name, grouped, images_of
from lightning_gradmetrics.scores.geometry import ClassCosines
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.registry import Score

__all__ = ["MapGallery"]


@dataclass
class _Seen:
    """Maps of one dataset: the number of samples, the sum of their maps, and the retained samples."""

    count: int
    total: Tensor
    values: Tensor
    maps: Tensor
    images: Tensor | None

    @classmethod
    def of(cls, values: Tensor, maps: Tensor, images: Tensor | None) -> _Seen:
        """Return all samples of a batch."""
        return cls(len(values), maps.sum(0, dtype=torch.float64), values, maps, images)

    def extremes(self, each: int) -> _Seen:
        """Return the ``each`` lowest and highest samples, in ascending order."""
        order = self.values.argsort(stable=True)
        kept = order if len(order) <= 2 * each else torch.cat([order[:each], order[-each:]])
        images = None if self.images is None else self.images[kept]
        return _Seen(self.count, self.total, self.values[kept], self.maps[kept], images)


def _merge_two(one: _Seen, other: _Seen) -> _Seen:
    """Return the samples of both; without images if one has none."""
    images = None
    if one.images is not None and other.images is not None:
        images = torch.cat([one.images, other.images])
    values, maps = torch.cat([one.values, other.values]), torch.cat([one.maps, other.maps])
    return _Seen(one.count + other.count, one.total + other.total, values, maps, images)


def _merge(parts: Sequence[_Seen], each: int) -> _Seen:
    return reduce(_merge_two, parts).extremes(each)


@dataclass
class MapGallery:
    """Pictures of the maps that a score of geometric gradient analysis computes.

    Args:
        score: The score that ranks the samples.
        probe: The computation of its maps.
        each: Number of samples kept from each end of the ranking, per dataset.
    """

    score: Score
    probe: ClassCosines
    each: int = 3
    seen: dict[str, _Seen] = field(default_factory=dict)

    @classmethod
    def of(cls, scores: Iterable[Score]) -> MapGallery | None:
        """Return the gallery of the first score that uses cosine similarity maps, or ``None``."""
        for score in scores:
            for probe in score.needs.probes:
                if isinstance(probe, ClassCosines):
                    return cls(score, probe)
        return None

    def look(self, evidence: Evidence) -> Tensor:
        """Return the maps."""
        size = self.probe.classes or evidence.logits.shape[1]
        return evidence.probe(self.probe, (size, size)).detach()

    def add(self, batch: ScoredBatch) -> None:
        """Read a batch; samples with NaN are left out."""
        maps, values, images = self.look(batch.evidence), batch.scores[self.score.name], images_of(batch.inputs)
        finite = maps.flatten(1).isfinite().all(1) & values.isfinite()
        if not finite.any():
            return
        pixels = None if images is None else images[finite.to(images.device)].float().cpu()
        seen = _Seen.of(values.detach()[finite].cpu().double(), maps[finite].float().cpu(), pixels)
        if batch.dataset in self.seen:
            seen = _merge_two(self.seen[batch.dataset], seen)
        self.seen[batch.dataset] = seen.extremes(self.each)

    def kept(self) -> dict[str, _Seen]:
        """Return the retained maps of each dataset."""
        return self.seen

    def join(self, parts: Sequence[dict[str, _Seen]]) -> None:
        """Keep the extreme samples and the mean of all processes."""
        self.seen = {}
        for name, seen in grouped(parts).items():
            self.seen[name] = _merge(seen, self.each)

    def tables(self) -> dict[str, pa.Table]:
        """Return no table, because the results contain the scores."""
        return {}

    def pictures(self) -> list[Picture]:
        """Return one figure with the mean map of each dataset, and one figure per dataset with its extreme samples."""
        if not self.seen:
            return []
        pictures = [self._means()]
        for name, seen in self.seen.items():
            pictures.append(self._samples(name, seen))
        return pictures

    def _means(self) -> Picture:
        from lightning_gradmetrics.pictures.cosine_map_figure import csm_figure

        means = torch.stack([seen.total / seen.count for seen in self.seen.values()])
        titles = [f"{name} ({seen.count})" for name, seen in self.seen.items()]
        caption = f"{self._axes()} Each map is the mean over a dataset; the number of samples is in brackets."
        return Picture("mean_maps", "Mean cosine similarity maps", caption, csm_figure(means, titles=titles))

    def _samples(self, name: str, seen: _Seen) -> Picture:
        from lightning_gradmetrics.pictures.cosine_map_figure import csm_figure

        titles = [f"{value:.3g}" for value in seen.values.tolist()]
        figure = csm_figure(seen.maps, images=seen.images, titles=titles, columns=2 * self.each)
        caption = (
            f"{self._axes()} The number above each map is {self.score.name}; the most certain samples come first, the most "
            "uncertain last."
        )
        return Picture(f"maps_{file_name(name)}", f"Cosine similarity maps of {name}", caption, figure)

    def _axes(self) -> str:
        classes = "classes" if self.probe.classes is None else "classes with the largest logits, in descending order"
        return (
            f"Cosine between the saliency maps of two classes; red means that they agree. Rows and columns: {classes}."
        )
