"""Predicted segments: connected components of the prediction, with their scores and their overlap with the labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["components", "segments_of"]

Array = npt.NDArray[Any]


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
    from scipy.ndimage import label

    numbers = np.zeros(prediction.shape, np.int64)
    classes: list[int] = []
    for value in np.unique(prediction[prediction >= 0]):
        inside, count = label(prediction == value, np.ones((3, 3)))
        numbers = np.where(inside > 0, inside + len(classes), numbers)
        classes += [int(value)] * count
    return numbers, np.array(classes, np.int64)


def segments_of(
    prediction: Array, labels: Array | None, maps: Mapping[str, Array], least: int
) -> Iterator[dict[str, Any]]:
    """Yield one row per predicted segment of an image: class, size, box, IoU, fraction of wrong pixels, mean scores.

    Pixels without a label split segments, as in MetaSeg. The IoU is computed between the segment and the union of all
    true components of its class that overlap it. Without labels, IoU and error are ``None``.

    Args:
        prediction: ``(H, W)``.
        labels: ``(H, W)``, negative where unknown; or ``None``.
        maps: The scores ``(H, W)`` by name.
        least: The smallest number of pixels of a segment.
    """
    cut = prediction if labels is None else np.where(labels < 0, -1, prediction)
    numbers, classes = components(cut)
    sizes = np.bincount(numbers.ravel(), minlength=len(classes) + 1)
    sums = {}
    for name, values in maps.items():
        sums[name] = np.bincount(numbers.ravel(), values.ravel(), minlength=len(classes) + 1)
    overlaps = None if labels is None else _Overlaps(numbers, classes, labels)
    boxes = _boxes(numbers)
    for number in np.flatnonzero(sizes >= max(1, least)).tolist():
        if number == 0:
            continue
        row: dict[str, Any] = {"segment": number, "class": int(classes[number - 1]), "size": int(sizes[number])}
        row["box"] = boxes[number - 1]
        row["iou"] = None if overlaps is None else overlaps.iou(number, int(sizes[number]))
        row["error"] = None if overlaps is None else overlaps.error(number, int(sizes[number]))
        for name, values in sums.items():
            row[name] = float(values[number] / sizes[number])
        yield row


def _boxes(numbers: Array) -> list[list[int]]:
    """Return top, left, bottom and right of each component; bottom and right are exclusive."""
    from scipy.ndimage import find_objects

    boxes = []
    for rows, columns in find_objects(numbers):
        boxes.append([rows.start, columns.start, rows.stop, columns.stop])
    return boxes


class _Overlaps:
    """The pixels that predicted and true components share."""

    def __init__(self, numbers: Array, classes: Array, labels: Array) -> None:
        true_numbers, true_classes = components(labels)
        true_sizes = np.bincount(true_numbers.ravel(), minlength=len(true_classes) + 1)
        pairs = numbers.ravel() * (len(true_classes) + 1) + true_numbers.ravel()
        codes, shared = np.unique(pairs, return_counts=True)
        one, other = np.divmod(codes, len(true_classes) + 1)
        fits = (one > 0) & (other > 0)
        one, other, shared = one[fits], other[fits], shared[fits]
        same = classes[one - 1] == true_classes[other - 1]
        count = len(classes) + 1
        self.hits = np.bincount(one[same], shared[same], minlength=count)
        self.true = np.bincount(one[same], true_sizes[other[same]], minlength=count)

    def iou(self, number: int, size: int) -> float:
        return float(self.hits[number] / (size + self.true[number] - self.hits[number]))

    def error(self, number: int, size: int) -> float:
        return float(1 - self.hits[number] / size)
