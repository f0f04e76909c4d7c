"""Arrow columns as arrays with one row per sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

__all__ = ["to_array"]


def to_array(column: pa.ChunkedArray | pa.Array) -> np.ndarray[Any, Any]:
    """Return an Arrow column as an array ``(N, ...)``.

    Args:
        column: Numbers, strings, lists of equal length, tensors, or nested lists of these.

    Raises:
        ValueError: If the lists of a column have different lengths, or a value is null.

    Example:
        >>> to_array(pa.array([[[1, 2]], [[3, 4]]])).shape
        (2, 1, 2)
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # an extension type, or no rows
        array = array.chunk(0) if array.num_chunks else pa.array([], column.type)
    if isinstance(array, pa.ExtensionArray):
        return _of_extension(array)
    if not pa.types.is_list(array.type) and not pa.types.is_large_list(array.type):
        return _of_fixed_size(array) if pa.types.is_fixed_size_list(array.type) else _plain(array)
    _refuse_null(array)
    lengths = np.diff(array.offsets.to_numpy())
    if len(lengths) and bool((lengths != lengths[0]).any()):
        raise ValueError(
            f"the lists of an input column have {lengths.min()} to {lengths.max()} values; expected equal lengths: pad them, or pass "
            "inputs=, a function from the batch to the model's inputs"
        )
    inner = to_array(array.flatten())
    return inner.reshape(len(array), int(lengths[0]) if len(lengths) else 0, *inner.shape[1:])


def _of_fixed_size(array: pa.FixedSizeListArray) -> np.ndarray[Any, Any]:
    _refuse_null(array)
    inner = to_array(array.flatten())
    return inner.reshape(len(array), array.type.list_size, *inner.shape[1:])


def _of_extension(array: pa.ExtensionArray) -> np.ndarray[Any, Any]:
    """Convert tensor columns of Arrow (``fixed_shape_tensor``) and of Ray."""
    if hasattr(array, "to_numpy_ndarray"):
        return np.asarray(array.to_numpy_ndarray())
    return np.asarray(array.to_numpy(zero_copy_only=False))


def _plain(array: pa.Array) -> np.ndarray[Any, Any]:
    _refuse_null(array)
    return np.asarray(array.to_numpy(zero_copy_only=False))


def _refuse_null(array: pa.Array) -> None:
    if array.null_count:
        raise ValueError(
            f"{array.null_count} of {len(array)} values of an input column are null: fill or drop these rows"
        )
