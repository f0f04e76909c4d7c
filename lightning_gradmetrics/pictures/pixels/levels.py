"""The metrics of a segmentation model as rows: metrics of pixels, of images, and of predicted segments."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.evaluation.intervals import FEWEST
from lightning_gradmetrics.meters.functional import auroc, spearman
from lightning_gradmetrics.meters.functional.ranking import auroc_of_counts
from lightning_gradmetrics.pictures.pixels.metrics import Estimates, Meters
from lightning_gradmetrics.pictures.pixels.resampling import (
    Estimate,
    GroupedCells,
    quantile_edges,
    weights_of_groups,
)

__all__ = ["class_metrics", "image_metrics", "pixel_metrics", "real_valued_aurc", "segment_metrics"]

Row = dict[str, Any]

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


def _by_dataset(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["dataset"], []).append(row)
    return groups


def _column(rows: Sequence[Row], name: str) -> Tensor:
    values = []
    for row in rows:
        values.append(float("nan") if row[name] is None else row[name])
    return torch.tensor(values, dtype=torch.float64)


def segment_metrics(segments: Sequence[Row], scores: Sequence[str], resamples: int) -> Iterator[Row]:
    """Yield the AUROC for two targets of predicted segments: an IoU of 0, and more than half of the pixels wrong.

    ``size`` is a baseline: minus the number of pixels.

    Args:
        segments: One row per segment, with or without labels.
        scores: The names of the scores.
        resamples: The number of bootstrap resamples of images.
    """
    weights = weights_of_groups(resamples)
    for dataset, rows in _by_dataset(segments).items():
        iou, error, groups = _column(rows, "iou"), _column(rows, "error"), _column(rows, "group").long()
        for task, target, known in (("iou = 0", iou == 0, ~iou.isnan()), ("error > 0.5", error > 0.5, ~error.isnan())):
            first: Estimate | None = None
            for score in (*scores, SIZE):
                values = -_column(rows, SIZE) if score == SIZE else _column(rows, score)
                used = known & values.isfinite()
                if not bool((target & used).any()) or bool((target | ~used).all()):
                    continue
                estimate = _area(values[used], target[used], groups[used], weights)
                first = first or estimate
                yield _row("segment", dataset, task, score, ("auroc", "all"), estimate, first)


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


def image_metrics(images: Sequence[Row], scores: Sequence[str], resamples: int) -> Iterator[Row]:
    """Yield rows on the relation of an image's score to its error and mIoU: Spearman's correlation, and AURC of the error.

    Args:
        images: One row per image.
        scores: The names of the scores.
        resamples: The number of bootstrap resamples of images.
    """
    for dataset, rows in _by_dataset(images).items():
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
