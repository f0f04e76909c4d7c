"""Pictures of the samples with the largest scores of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_gradmetrics.pictures.base import Picture, ScoredBatch, file_name, grouped, images_of
from lightning_gradmetrics.scoring.evidence import Evidence

__all__ = ["ExampleGallery", "displayed", "thumbnails"]

SIDE = 96
"""Longest side of a thumbnail, in pixels."""


def thumbnails(images: Tensor, side: int = SIDE) -> Tensor:
    """Return images on the CPU, reduced by averaging to at most ``side`` pixels per side; smaller images keep their size.

    Args:
        images: Images ``(N, C, H, W)``.
        side: Longest side of the result, in pixels.

    Example:
        >>> thumbnails(torch.zeros(2, 3, 400, 200)).shape, thumbnails(torch.zeros(2, 1, 8, 8)).shape
        (torch.Size([2, 3, 96, 48]), torch.Size([2, 1, 8, 8]))
    """
    longest = max(images.shape[2:])
    if longest > side:
        height, width = (max(1, round(length * side / longest)) for length in images.shape[2:])
        images = torch.nn.functional.adaptive_avg_pool2d(images.float(), (height, width))
    return images.float().cpu()


def displayed(image: Tensor) -> NDArray[np.uint8]:
    """Return an image ``(1 or 3, H, W)`` as bytes ``(H, W)`` or ``(H, W, 3)``, with its range of values stretched to 0–255.

    Args:
        image: The image.

    Example:
        >>> displayed(torch.tensor([[[0.0, 2.0]]])).tolist()
        [[0, 255]]
    """
    values = image.float().cpu().numpy()
    low, high = float(values.min()), float(values.max())
    stretched = (values - low) / (high - low) if high > low else np.zeros_like(values)
    pixels = (255 * stretched).round().astype(np.uint8)
    return pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))


@dataclass
class _Top:
    """Samples of one dataset in descending order of one score; images may differ in size."""

    images: list[Tensor]
    value: Tensor
    index: Tensor
    label: Tensor
    prediction: Tensor

    def largest(self, count: int) -> _Top:
        """Return the ``count`` largest; among equal values, those with the lower index."""
        by_index = self.index.argsort(stable=True)
        order = by_index[self.value[by_index].argsort(descending=True, stable=True)][:count]
        images = [self.images[position] for position in order]
        return _Top(images, self.value[order], self.index[order], self.label[order], self.prediction[order])


def _merge_two(one: _Top, other: _Top) -> _Top:
    """Return the samples of both, unsorted."""
    return _Top(
        one.images + other.images,
        torch.cat([one.value, other.value]),
        torch.cat([one.index, other.index]),
        torch.cat([one.label, other.label]),
        torch.cat([one.prediction, other.prediction]),
    )


def _merge(parts: Sequence[_Top], count: int) -> _Top:
    """Return the ``count`` largest of all parts."""
    return reduce(_merge_two, parts).largest(count)


@dataclass
class ExampleGallery:
    """Thumbnails of the samples with the largest scores of each dataset; requires images as inputs.

    Args:
        counts: Number of samples to keep, by score.
    """

    counts: Mapping[str, int]
    seen: dict[tuple[str, str], _Top] = field(default_factory=dict)

    def look(self, evidence: Evidence) -> None:
        """Request nothing, because the batch contains the scores."""

    def add(self, batch: ScoredBatch) -> None:
        """Read a batch; samples with NaN or Inf are left out, as in the evaluation."""
        images = images_of(batch.inputs)
        if images is None or not batch.finite.any():
            return
        for score, count in self.counts.items():
            largest = _largest_of_batch(batch, batch.scores[score].detach(), images, count)
            key = (batch.dataset, score)
            if key in self.seen:
                largest = _merge([self.seen[key], largest], count)
            self.seen[key] = largest

    def kept(self) -> dict[tuple[str, str], _Top]:
        """Return the largest of each dataset and score."""
        return self.seen

    def join(self, parts: Sequence[dict[tuple[str, str], _Top]]) -> None:
        """Keep the largest samples of all processes."""
        self.seen = {}
        for (dataset, score), tops in grouped(parts).items():
            self.seen[dataset, score] = _merge(tops, self.counts[score])

    def rows(self) -> Iterator[tuple[str, str, float, int, int, int, Tensor]]:
        """Yield dataset, score, value, index, label, prediction and image of each sample."""
        for (dataset, score), top in self.seen.items():
            for position, image in enumerate(top.images):
                numbers = int(top.index[position]), int(top.label[position]), int(top.prediction[position])
                yield dataset, score, float(top.value[position]), *numbers, image

    def tables(self) -> dict[str, pa.Table]:
        """Return no table: :func:`lightning_gradmetrics.largest` computes it from the results."""
        return {}

    def pictures(self) -> list[Picture]:
        """Return one figure per dataset and score."""
        pictures = []
        for (dataset, score), top in self.seen.items():
            pictures.append(_picture(dataset, score, top))
        return pictures


def _largest_of_batch(batch: ScoredBatch, values: Tensor, images: Tensor, count: int) -> _Top:
    """Return the finite samples of a batch with the largest values; only their images are copied."""
    finite = batch.finite.to(values.device).nonzero()[:, 0]
    rows = finite[values[finite].argsort(descending=True, stable=True)[:count]]

    def take(column: Tensor) -> Tensor:
        return column[rows.to(column.device)].cpu()

    shown = thumbnails(images[rows.to(images.device)])
    return _Top(list(shown), take(values), take(batch.index), take(batch.label), take(batch.prediction))


def _picture(dataset: str, score: str, top: _Top) -> Picture:
    from lightning_gradmetrics.pictures.figures import examples_figure

    figure = examples_figure(top.images, top.value, top.index, top.label, top.prediction)
    labelled = bool((top.label >= 0).any())
    below = "its label, and the predicted class if it differs" if labelled else "the predicted class"
    caption = (
        f"The {len(top.value)} samples of {dataset} with the largest {score}, in descending order. Above each image: its "
        f"index and its score; below: {below}. Each image is stretched to its range of values."
    )
    name = f"largest_{file_name(dataset)}_{file_name(score)}"
    return Picture(name, f"Largest {score} of {dataset}", caption, figure, "Examples with the largest scores")
