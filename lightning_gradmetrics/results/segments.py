"""Converts a results table of images to one row per predicted segment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["SEGMENT_COLUMNS", "SEGMENT_PREFIX", "has_segments", "segment_table"]

SEGMENT_PREFIX = "segments/"
"""Prefix of list columns with a score for every predicted segment."""

SEGMENT_COLUMNS = {
    "segment": "segment_numbers",
    "class": "segment_classes",
    "size": "segment_sizes",
    "box": "segment_boxes",
    "iou": "segment_ious",
    "error": "segment_errors",
}
"""The columns of :func:`segment_table` that are not scores, and the list columns that contain them."""


def has_segments(results: pa.Table) -> bool:
    """Return whether a results table is of images, with lists of predicted segments."""
    return SEGMENT_COLUMNS["segment"] in results.column_names


def segment_table(results: pa.Table, class_names: Sequence[str] | None = None) -> pa.Table:
    """Return one row per predicted segment of a results table of images.

    Args:
        results: The results of a segmentation model, with the columns ``segment_numbers``, ``segment_classes`` and so on,
            and ``segments/<score>``, such as ``callback.results`` or the result of
            :func:`lightning_gradmetrics.read_results`.
        class_names: The names of the classes; by default their numbers.

    Returns:
        The columns ``dataset``; ``index``, the image's index in the dataset; ``segment``; ``class``; ``size`` in pixels;
        ``box``: top, left, bottom and right, of which the last two are exclusive; ``iou`` and ``error``, NaN without
        labels as in the rows of images; the mean of each score; and ``class_name``. Empty if the results have no segments.

    Example:
        >>> columns = {"dataset": ["a", "a"], "index": [0, 1], "segment_numbers": [[1, 2], []], "segment_classes": [[3, 0], []]}
        >>> table = pa.table({**columns, "segments/entropy": [[0.1, 0.9], []]})
        >>> segment_table(table).to_pylist()[1]
        {'dataset': 'a', 'index': 0, 'segment': 2, 'class': 0, 'entropy': 0.9, 'class_name': '0'}
    """
    if not has_segments(results):
        return pa.table({})
    parents = pc.list_parent_indices(results[SEGMENT_COLUMNS["segment"]].combine_chunks())
    columns = {"dataset": results["dataset"].take(parents), "index": results["index"].take(parents)}
    for name, source in SEGMENT_COLUMNS.items():
        if source in results.column_names:
            columns[name] = pc.list_flatten(results[source])
    for name in results.column_names:
        if name.startswith(SEGMENT_PREFIX):
            columns[name.removeprefix(SEGMENT_PREFIX)] = pc.list_flatten(results[name])
    if "class" in columns:
        columns["class_name"] = _names(columns["class"], class_names)
    return pa.table(columns)


def _names(classes: pa.ChunkedArray, class_names: Sequence[str] | None) -> pa.Array:
    """Return the name of each class."""
    numbers = classes.to_numpy()
    if class_names is None:
        return pa.array(numbers.astype(str))
    return pa.array(list(class_names)).take(pa.array(numbers.astype(np.int64)))
