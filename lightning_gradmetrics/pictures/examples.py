"""Pictures of the samples with the largest scores of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import torch
from torch import Tensor

from lightning_gradmetrics.pictures.base import Picture, ScoredBatch, file_name, images_of
from lightning_gradmetrics.scoring.evidence import Evidence

__all__ = ["ExampleGallery", "thumbnails"]

SIDE = 96
"""Longest side of a thumbnail, in pixels."""


def thumbnails(images: Tensor, side: int = SIDE) -> Tensor:
    """Images shrunk to at most ``side`` pixels a side by averaging, on the CPU; smaller ones as they are.

    Args:
        images: ``(N, C, H, W)``.
        side: The longest side afterwards.

    Example:
        >>> thumbnails(torch.zeros(2, 3, 400, 200)).shape, thumbnails(torch.zeros(2, 1, 8, 8)).shape
        (torch.Size([2, 3, 96, 48]), torch.Size([2, 1, 8, 8]))
    """
    longest = max(images.shape[2:])
    if longest > side:
        height, width = (max(1, round(length * side / longest)) for length in images.shape[2:])
        images = torch.nn.functional.adaptive_avg_pool2d(images.float(), (height, width))
    return images.float().cpu()


@dataclass
class _Top:
    """Samples of one data set with their values of one score, the largest first; images may differ in size."""

    images: list[Tensor]
    value: Tensor
    index: Tensor
    label: Tensor
    prediction: Tensor

    def largest(self, count: int) -> _Top:
        """The ``count`` largest; of equal ones those with the lower index."""
        by_index = self.index.argsort(stable=True)
        order = by_index[self.value[by_index].argsort(descending=True, stable=True)][:count]
        columns = (self.value, self.index, self.label, self.prediction)
        return _Top([self.images[i] for i in order], *(column[order] for column in columns))


def _joined(parts: Sequence[_Top], count: int) -> _Top:
    """The largest of several."""
    columns = [torch.cat([getattr(part, key) for part in parts]) for key in ("value", "index", "label", "prediction")]
    return _Top([image for part in parts for image in part.images], *columns).largest(count)


@dataclass
class ExampleGallery:
    """Thumbnails of the samples with the largest scores of each data set; only of inputs that are images.

    Args:
        counts: How many to keep, by score.
    """

    counts: Mapping[str, int]
    seen: dict[tuple[str, str], _Top] = field(default_factory=dict)

    def look(self, evidence: Evidence) -> None:
        """The scores are at hand."""

    def add(self, batch: ScoredBatch) -> None:
        """Look at a batch; samples with NaN or Inf are left out, as in the evaluation."""
        images = images_of(batch.inputs)
        if images is None or not batch.finite.any():
            return
        for score, count in self.counts.items():
            key = (batch.dataset, score)
            found = self._top(batch, batch.scores[score].detach(), images, count)
            self.seen[key] = _joined([self.seen[key], found] if key in self.seen else [found], count)

    def _top(self, batch: ScoredBatch, values: Tensor, images: Tensor, count: int) -> _Top:
        """The batch's largest; the images of no more are taken."""
        finite = batch.finite.to(values.device).nonzero()[:, 0]
        rows = finite[values[finite].argsort(descending=True, stable=True)[:count]]
        columns = (values, batch.index, batch.label, batch.prediction)
        shown = thumbnails(images[rows.to(images.device)])
        return _Top(list(shown), *(column[rows.to(column.device)].cpu() for column in columns))

    def kept(self) -> dict[tuple[str, str], _Top]:
        """The largest of each data set and score."""
        return self.seen

    def join(self, parts: Sequence[dict[tuple[str, str], _Top]]) -> None:
        """The largest of all processes."""
        keys = dict.fromkeys(key for part in parts for key in part)
        self.seen = {key: _joined([part[key] for part in parts if key in part], self.counts[key[1]]) for key in keys}

    def tables(self) -> dict[str, pa.Table]:
        """None: :func:`lightning_gradmetrics.largest` makes them of the results."""
        return {}

    def pictures(self) -> list[Picture]:
        """A figure for each data set and score."""
        return [self._picture(dataset, score, top) for (dataset, score), top in self.seen.items()]

    def _picture(self, dataset: str, score: str, top: _Top) -> Picture:
        from lightning_gradmetrics.pictures.figures import examples_figure

        figure = examples_figure(top.images, top.value, top.index, top.label, top.prediction)
        labelled = bool((top.label >= 0).any())
        caption = (
            f"The {len(top.value)} samples of {dataset} with the largest {score}, the largest first. Above each: its index "
            f"and its score; below: {'its label and the predicted class, if another' if labelled else 'the predicted class'}. "
            "Each image is stretched to its own range of values."
        )
        name = f"largest_{file_name(dataset)}_{file_name(score)}"
        return Picture(name, f"Largest {score} of {dataset}", caption, figure, "Examples with the largest scores")
