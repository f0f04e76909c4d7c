"""Values of images computed from their pixels: aggregated scores, the fraction of wrong pixels, and mean IoU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_gradmetrics.pictures.pixels.segments import segments_of
from lightning_gradmetrics.pictures.pixels.settings import Pixels
from lightning_gradmetrics.results.finite import finite_rows
from lightning_gradmetrics.results.rows import FurtherColumns
from lightning_gradmetrics.results.segments import SEGMENT_COLUMNS, SEGMENT_PREFIX
from lightning_gradmetrics.scoring.evidence import Evidence

__all__ = [
    "aggregate",
    "class_shares",
    "columns_of",
    "further_columns",
    "image_errors",
    "image_level",
    "image_scores",
    "mean_iou",
]

MOST_VALUES = 2**24
"""The largest number of values that ``torch.quantile`` takes."""


def aggregate(maps: Tensor, name: str) -> Tensor:
    """Return an aggregate of the pixels of each image, ``(N,)``, over all pixels, labelled or not.

    Pixels whose value is NaN because their label is unknown are left out of the mean and the quantiles.

    Args:
        maps: ``(N, H, W)``.
        name: ``"mean"``, ``"max"``, or a quantile as ``"q95"``.

    Example:
        >>> aggregate(torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]), "mean")
        tensor([1.5000], dtype=torch.float64)
    """
    rows = maps.flatten(1).double()
    if name == "mean":
        return rows.nanmean(1)
    if name == "max":
        return rows.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1)
    percent, size = float(name[1:]), max(1, rows.shape[1])
    if size > MOST_VALUES:
        return _quantile(rows, percent)
    blocks = rows.split(MOST_VALUES // size)  # type: ignore[no-untyped-call]
    return torch.cat([block.nanquantile(percent / 100, 1) for block in blocks])


def _quantile(rows: Tensor, percent: float) -> Tensor:
    """Return the quantile without interpolation, for rows that are too long for ``torch.quantile``."""
    known = rows.isfinite().sum(1)
    rank = ((known - 1).clamp(min=0) * percent / 100).round().long()
    return rows.sort(1).values.gather(1, rank[:, None])[:, 0]


def image_scores(maps: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return an aggregate of every score, ``(N,)`` each."""
    scores = {}
    for score, values in maps.items():
        scores[score] = aggregate(values, name)
    return scores


def class_shares(prediction: Tensor, classes: int) -> Tensor:
    """Return the fraction of pixels predicted as each class, ``(N, C)``.

    Args:
        prediction: ``(N, H, W)``, class numbers.
        classes: The number of classes C.
    """
    rows = []
    for image in prediction.flatten(1):
        rows.append(torch.bincount(image, minlength=classes) / max(1, len(image)))
    return torch.stack(rows)


def image_errors(prediction: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of labelled pixels of each image, and the fraction of them that is wrong, ``(N,)`` each.

    Args:
        prediction: ``(N, H, W)``.
        labels: ``(N, H, W)``; negative if unknown.
    """
    known = (labels >= 0).flatten(1)
    wrong = (prediction != labels).flatten(1) & known
    count = known.sum(1)
    return count, wrong.sum(1).double() / count  # NaN without labelled pixels


def mean_iou(prediction: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the mean intersection over union of the classes in each image's labels, ``(N,)``, over labelled pixels.

    Args:
        prediction: ``(N, H, W)``.
        labels: ``(N, H, W)``; negative if unknown.
        classes: The number of classes.
    """
    values = []
    for image, truth in zip(prediction.flatten(1), labels.flatten(1), strict=True):
        codes = torch.where(truth >= 0, truth * classes + image, classes * classes)
        pairs = torch.bincount(codes, minlength=classes * classes + 1)[:-1].view(classes, classes)
        hits, present = pairs.diagonal().double(), pairs.sum(1) > 0
        union = pairs.sum(0) + pairs.sum(1) - pairs.diagonal()
        values.append((hits / union)[present].mean())
    return torch.stack(values)


def columns_of(
    maps: Mapping[str, Tensor], prediction: Tensor, labels: Tensor | None, classes: int, aggregates: Sequence[str]
) -> dict[str, Tensor]:
    """Return the additional columns of the rows of images, ``(N,)`` each."""
    count, height, width = prediction.shape
    columns = {"height": torch.full((count,), height), "width": torch.full((count,), width)}
    known = torch.full_like(prediction, -1) if labels is None else labels
    columns["pixels"], columns["error"] = image_errors(prediction, known)
    columns["miou"] = mean_iou(prediction, known, classes)
    for name in aggregates[1:]:
        for score, values in image_scores(maps, name).items():
            columns[f"{score}/{name}"] = values
    return columns


def segment_lists(
    maps: Mapping[str, Tensor], prediction: Tensor, labels: Tensor | None, least: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the list columns of the predicted segments of all images, and the number of segments of each image ``(N,)``.

    Args:
        maps: The scores ``(N, H, W)``.
        prediction: ``(N, H, W)``.
        labels: ``(N, H, W)``, negative where unknown; or ``None``.
        least: The smallest number of pixels of a segment.
    """
    lists: dict[str, list[Tensor]] = {}
    lengths = []
    for number, classes in enumerate(prediction.cpu().numpy()):
        truth = None if labels is None else labels[number].cpu().numpy()
        arrays = {}
        for name, values in maps.items():
            arrays[name] = values[number].double().cpu().numpy()
        segments = segments_of(classes, truth, arrays, least)
        lengths.append(len(segments.columns["segment"]))
        for name, entries in segments.columns.items():
            lists.setdefault(SEGMENT_COLUMNS[name], []).append(torch.from_numpy(entries))
        for name, entries in segments.scores.items():
            lists.setdefault(f"{SEGMENT_PREFIX}{name}", []).append(torch.from_numpy(entries))
    return {name: torch.cat(parts) for name, parts in lists.items()}, torch.tensor(lengths)


def further_columns(evidence: Evidence, maps: Mapping[str, Tensor], settings: Pixels) -> FurtherColumns:
    """Return the further columns of the rows of images: error, IoU, further aggregates, and lists of predicted segments.

    Args:
        evidence: The evidence of the pixels.
        maps: The scores ``(N, H, W)``.
        settings: The aggregates, and the smallest number of pixels of a segment.
    """
    logits, labels = evidence.given_logits, evidence.given_labels
    prediction = evidence.given_prediction
    values = columns_of(maps, prediction, labels, logits.shape[1], settings.aggregates)
    if not settings.segments:
        return FurtherColumns(values)
    return FurtherColumns(values, *segment_lists(maps, prediction, labels, settings.segments))


def image_level(
    evidence: Evidence, maps: Mapping[str, Tensor], name: str, columns: Sequence[str] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the values of images computed from their pixels: the fractions of the predicted classes, and the scores.

    If the logits contain NaN or Inf, the largest fraction is Inf, so that the image's row is not finite.

    Args:
        evidence: The evidence of the pixels.
        maps: The scores ``(N, H, W)``.
        name: The name of the aggregate.
        columns: Additional columns of the results, which are defined for samples only.

    Raises:
        ValueError: If additional columns are requested.
    """
    if columns:
        raise ValueError(f"columns= names {columns[0]!r}, and further columns are defined for samples, not for pixels")
    logits = evidence.given_logits
    shares = class_shares(evidence.given_prediction, logits.shape[1])
    is_finite = finite_rows(None, [logits], len(logits))
    is_largest = shares == shares.amax(1, keepdim=True)
    return shares.masked_fill(is_largest & ~is_finite[:, None], torch.inf), image_scores(maps, name)
