"""The metrics of a segmentation model as rows: metrics of pixels, of images, and of predicted segments."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from lightning_gradmetrics.evaluation.intervals import FEWEST
from lightning_gradmetrics.meters.functional import auroc, spearman
from lightning_gradmetrics.meters.functional.ranking import auroc_of_counts
from lightning_gradmetrics.pictures.pixels.metrics import Estimates, Meters
from lightning_gradmetrics.pictures.pixels.resampling import (
    GROUPS,
    Estimate,
    GroupedCells,
    quantile_edges,
    weights_of_groups,
)

__all__ = ["class_metrics", "image_metrics", "labelled_pixels", "pixel_metrics", "real_valued_aurc", "segment_metrics"]

Row = dict[str, Any]

Read = Callable[[list[str]], pa.Table]
"""A function from the names of columns to a table with these."""

SIZE = "size"
"""The baseline score of segments, by which small segments are more uncertain."""


def _row(unit: str, dataset: str, task: str, score: str, key: tuple[str, str], found: Estimate, first: Estimate) -> Row:
    """Return a row, with the difference to the run's first score."""
    low, high = found.interval()
    difference, below, above = found.minus(first)
    row: Row = {"dataset": dataset, "unit": unit, "task": task, "score": score, "metric": key[0], "within": key[1]}
    row |= {"value": found.value, "low": low, "high": high}
    return row | {"difference": difference, "difference_low": below, "difference_high": above}


def pixel_metrics(meters: Meters) -> Iterator[Row]:
    """Yield one row per dataset, task, score, metric and kind of pooling.

    ``difference`` is the difference to the first score, with its paired interval over images.

    Args:
        meters: The meters by dataset, task and score.
    """
    first: dict[tuple[str, str], Estimates] = {}
    for (dataset, task, score), meter in meters.items():
        estimates = meter.estimates()
        reference = first.setdefault((dataset, task), estimates)
        for key, estimate in estimates.items():
            yield _row("pixel", dataset, task, score, key, estimate, reference[key])


def class_metrics(meters: Meters, names: Sequence[str]) -> Iterator[Row]:
    """Yield one row per dataset, task, score and predicted class: pixels, fraction of positives, and AUROC in the class.

    Args:
        meters: The meters by dataset, task and score.
        names: The name of each class.
    """
    for (dataset, task, score), meter in meters.items():
        for number, pool in sorted(meter.by_class.items()):
            counts = pool.counts()
            pixels = float(counts.positives + counts.negatives)
            row: Row = {"dataset": dataset, "task": task, "score": score, "class": number, "class_name": names[number]}
            row |= {"pixels": int(pixels), "share": float(counts.positives) / pixels}
            yield row | {"auroc": float(auroc_of_counts(counts))}


def _by_dataset(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    for dataset in pc.unique(table["dataset"]).to_pylist():
        yield dataset, table.filter(pc.equal(table["dataset"], dataset))


def _column(table: pa.Table, name: str) -> Tensor:
    """Return a column in float64, with NaN for null."""
    return torch.from_numpy(table[name].cast(pa.float64()).to_numpy().copy())


def segment_metrics(read: Read, scores: Sequence[str], resamples: int) -> Iterator[Row]:
    """Yield the AUROC for two targets of predicted segments: an IoU of 0, and more than half of the pixels wrong.

    ``size`` is a baseline: minus the number of pixels.

    Args:
        read: Returns the columns with these names, one row per segment.
        scores: The names of the scores, whose columns are read one after the other.
        resamples: The number of bootstrap resamples of images.
    """
    weights = weights_of_groups(resamples)
    first: dict[tuple[str, str], Estimate] = {}
    for score in (*scores, SIZE):
        names = dict.fromkeys(("dataset", "index", SIZE, "iou", "error", score))
        for dataset, segments in _by_dataset(read(list(names))):
            values = -_column(segments, SIZE) if score == SIZE else _column(segments, score)
            groups = _column(segments, "index").long() % GROUPS
            iou, error = _column(segments, "iou"), _column(segments, "error")
            for task, target, risk in (("iou = 0", iou == 0, iou), ("error > 0.5", error > 0.5, error)):
                used = risk.isfinite() & values.isfinite()
                if not bool((target & used).any()) or bool((target | ~used).all()):
                    continue
                estimate = _area(values[used], target[used], groups[used], weights)
                reference = first.setdefault((dataset, task), estimate)
                yield _row("segment", dataset, task, score, ("auroc", "all"), estimate, reference)


def _area(values: Tensor, target: Tensor, groups: Tensor, weights: Tensor) -> Estimate:
    replicates = None
    if len(weights):
        cells = GroupedCells(quantile_edges(values))
        cells.add(values, target, groups)
        replicates = cells.areas(weights)[0] if cells.has_interval else None
    return Estimate(float(auroc(values, target.long())), replicates)


def real_valued_aurc(scores: Tensor, risks: Tensor) -> float:
    """Return the mean over k of the mean risk of the k most certain samples, averaged over all orders of ties.

    Args:
        scores: ``(N,)``, higher = more uncertain.
        risks: ``(N,)``, for example the error rate of each image.

    Example:
        >>> print(f"{real_valued_aurc(torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.3])):.3f}")
        0.150
    """
    tied = torch.unique(scores, return_inverse=True)[1]
    means = torch.bincount(tied, risks.double()) / torch.bincount(tied)
    ordered = means[tied.sort().values]
    return float((ordered.cumsum(0) / torch.arange(1, len(risks) + 1)).mean())


def labelled_pixels(images: pa.Table) -> tuple[int, float]:
    """Return the number of pixels with a label in all images, and the accuracy on them (NaN without any).

    Args:
        images: One row per image, with the columns ``pixels`` and ``error``.
    """
    pixels = _column(images, "pixels").nan_to_num(0.0)
    wrong = pixels * _column(images, "error").nan_to_num(0.0)
    return int(pixels.sum()), float(1 - wrong.sum() / pixels.sum())


def image_metrics(images: pa.Table, scores: Sequence[str], resamples: int) -> Iterator[Row]:
    """Yield rows on the relation of an image's score to its error and mIoU: Spearman's correlation, and AURC of the error.

    Args:
        images: One row per image, with the columns ``dataset``, ``error``, ``miou`` and the scores.
        scores: The names of the scores.
        resamples: The number of bootstrap resamples of images.
    """
    for dataset, rows in _by_dataset(images):
        risks = {"error": _column(rows, "error"), "1 - miou": 1 - _column(rows, "miou")}
        for task, risk in risks.items():
            first: dict[str, Estimate] = {}
            for score in scores:
                values = _column(rows, score)
                known = risk.isfinite() & values.isfinite()
                if int(known.sum()) < 2:
                    continue
                for metric, estimate in _image_estimates(values[known], risk[known], resamples).items():
                    reference = first.setdefault(metric, estimate)
                    yield _row("image", dataset, task, score, (metric, "all"), estimate, reference)


def _image_estimates(values: Tensor, risk: Tensor, resamples: int) -> Mapping[str, Estimate]:
    area = Estimate(real_valued_aurc(values, risk))
    if not resamples or len(values) < FEWEST:
        return {"spearman": Estimate(_correlation(values, risk)), "aurc": area}
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    replicates = [_correlation(values[rows], risk[rows]) for rows in drawn]
    replicates.append(_correlation(values, risk))
    return {"spearman": Estimate(replicates[-1], torch.tensor(replicates, dtype=torch.float64)), "aurc": area}


def _correlation(values: Tensor, risk: Tensor) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # NaN if all values are equal
        return float(spearman(torch.stack([values, risk], 1))[0, 1])
