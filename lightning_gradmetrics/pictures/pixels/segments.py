"""Predicted segments: connected components of the prediction, with their scores and their overlap with the labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Segments", "components", "segments_of"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Segments:
    """The predicted segments of one image: one entry per segment in every array.

    Args:
        columns: ``segment``, the number of the component; ``class``; ``size``, its pixels; ``box`` ``(K, 4)``: top,
            left, bottom and right, of which the last two are exclusive; ``iou``; and ``error``, the fraction of wrong
            pixels. The last two are NaN without labels.
        scores: The mean of each score ``(K,)`` by name.
    """

    columns: Mapping[str, Array]
    scores: Mapping[str, Array]


def components(prediction: Array) -> tuple[Array, Array]:
    """Return the 8-connected components of pixels of equal class, and the class of each.

    Args:
        prediction: ``(H, W)``, class numbers; negative pixels belong to no component.

    Returns:
        The number of each pixel's component ``(H, W)``, from 1, and 0 for none; and the classes ``(K,)``.

    Example:
        >>> numbers, classes = components(np.array([[0, 1], [1, 0]]))
        >>> numbers.tolist(), classes.tolist()
        ([[1, 2], [2, 1]], [0, 1])
    """
    from scipy.ndimage import find_objects, label

    numbers = np.zeros(prediction.shape, np.int32)
    classes: list[int] = []
    for value, box in enumerate(find_objects(prediction.astype(np.int32) + 1)):
        if box is None:
            continue
        inside, count = label(prediction[box] == value, np.ones((3, 3)))
        inside[inside > 0] += len(classes)
        numbers[box] += inside
        classes += [value] * count
    return numbers, np.array(classes, np.int64)


def segments_of(prediction: Array, labels: Array | None, maps: Mapping[str, Array], least: int) -> Segments:
    """Return the predicted segments of an image.

    Pixels without a label split segments, as in MetaSeg. The IoU is computed between the segment and the union of all
    true components of its class that overlap it.

    Args:
        prediction: ``(H, W)``.
        labels: ``(H, W)``, negative where unknown; or ``None``.
        maps: The scores ``(H, W)`` by name.
        least: The smallest number of pixels of a segment.
    """
    cut = prediction if labels is None else np.where(labels < 0, -1, prediction)
    numbers, classes = components(cut)
    sizes = np.bincount(numbers.ravel(), minlength=len(classes) + 1)
    kept = 1 + np.flatnonzero(sizes[1:] >= least)
    columns = {"segment": kept, "class": classes[kept - 1], "size": sizes[kept], "box": _boxes(numbers)[kept - 1]}
    for name, values in columns.items():
        columns[name] = values.astype(np.int32)
    hits, true = _overlaps(numbers, len(sizes), cut, labels)
    columns["iou"] = hits[kept] / (sizes[kept] + true[kept] - hits[kept])
    columns["error"] = 1 - hits[kept] / sizes[kept]
    scores = {}
    for name, values in maps.items():
        sums = np.bincount(numbers.ravel(), values.ravel(), minlength=len(sizes))
        scores[name] = sums[kept] / sizes[kept]
    return Segments(columns, scores)


def _boxes(numbers: Array) -> Array:
    """Return top, left, bottom and right of each component ``(K, 4)``."""
    from scipy.ndimage import find_objects

    boxes = []
    for rows, columns in find_objects(numbers):
        boxes.append([rows.start, columns.start, rows.stop, columns.stop])
    return np.array(boxes, np.int64).reshape(-1, 4)


def _overlaps(numbers: Array, count: int, prediction: Array, labels: Array | None) -> tuple[Array, Array]:
    """Return, for each predicted component, its correct pixels and the pixels of the true components that contain these.

    Args:
        numbers: The predicted component of each pixel ``(H, W)``, below ``count``.
        count: The number of components, including 0 for none.
        prediction: ``(H, W)``.
        labels: ``(H, W)``, or ``None``.

    Returns:
        Two arrays ``(count,)``; NaN without labels.
    """
    if labels is None:
        return np.full(count, np.nan), np.full(count, np.nan)
    true_numbers, true_classes = components(labels)
    true_sizes = np.bincount(true_numbers.ravel(), minlength=len(true_classes) + 1)
    is_correct = (prediction == labels) & (labels >= 0)
    codes = numbers[is_correct].astype(np.int64) * len(true_sizes) + true_numbers[is_correct]
    codes, shared = np.unique(codes, return_counts=True)
    segment, true_segment = np.divmod(codes, len(true_sizes))
    return np.bincount(segment, shared, minlength=count), np.bincount(
        segment, true_sizes[true_segment], minlength=count
    )
