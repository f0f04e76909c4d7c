"""Reads results tables of any common type."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from pyarrow.dataset import Dataset
    from typing_extensions import TypeIs

__all__ = ["as_table", "chosen_columns", "finite_rows", "float_column", "is_dataset", "known_labels", "score_column"]


def as_table(results: Any, columns: Sequence[str] | None = None, optional: Sequence[str] = ()) -> pa.Table:
    """Return results as an Arrow table.

    Args:
        results: An Arrow table, record batch, iterable of record batches, record batch reader or dataset, a pandas or
            Polars data frame, or any other object with the Arrow C stream interface.
        columns: The columns that are needed; by default all.
        optional: Columns that are read if they exist.

    Returns:
        The table, with the needed columns only.

    Raises:
        TypeError: If the results are of an unsupported type.
        ValueError: If a column is missing.
    """
    if is_dataset(results):
        names = chosen_columns(results.schema.names, columns, optional)
        return results.to_table(columns=names)
    table = _whole_table(results)
    return table.select(chosen_columns(table.column_names, columns, optional))


def is_dataset(results: Any) -> TypeIs[Dataset]:
    """Return whether results are an Arrow dataset. Its module is not imported, because that imports pandas."""
    module = sys.modules.get("pyarrow.dataset")
    return module is not None and isinstance(results, module.Dataset)


def _whole_table(results: Any) -> pa.Table:
    if isinstance(results, pa.Table):
        return results
    if isinstance(results, pa.RecordBatch):
        return pa.Table.from_batches([results])
    if isinstance(results, pa.RecordBatchReader):
        return results.read_all()
    if type(results).__module__.partition(".")[0] == "pandas":
        return pa.Table.from_pandas(results, preserve_index=False)
    if hasattr(results, "__arrow_c_stream__"):
        return pa.table(results)
    if not isinstance(results, (str, bytes, dict)) and hasattr(results, "__iter__"):
        batches = list(results)
        if batches and all(isinstance(batch, pa.RecordBatch) for batch in batches):
            return pa.Table.from_batches(batches)
    raise TypeError(
        "results must be an Arrow table, record batches or dataset, a pandas or Polars data frame, or a results directory, "
        f"got {type(results).__name__}"
    )


def chosen_columns(names: Sequence[str], columns: Sequence[str] | None, optional: Sequence[str]) -> list[str]:
    """Return the needed columns, and the optional ones that exist.

    Args:
        names: The columns of the results.
        columns: The columns that are needed; ``None`` for all.
        optional: Columns that are read where they exist.

    Raises:
        ValueError: If a column is missing.
    """
    if columns is None:
        return list(names)
    for name in columns:
        if name not in names:
            raise ValueError(f"the results have no column {name!r}; columns: {', '.join(names)}")
    present = [name for name in optional if name in names]
    return list(dict.fromkeys([*columns, *present]))


def float_column(results: pa.Table, name: str) -> Any:
    """Return a column as a float64 array, with NaN for null.

    Raises:
        ValueError: If there is no such column, or it has no numbers.
    """
    if name not in results.column_names:
        raise ValueError(f"the results have no column {name!r}; columns: {', '.join(results.column_names)}")
    kind = results[name].type
    value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (
        pa.types.is_string(value_kind) or pa.types.is_large_string(value_kind)
    ):  # the digits of a text would be cast
        with suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return results[name].cast(pa.float64()).to_numpy()
    if pa.types.is_integer(value_kind):
        raise ValueError(
            f"the column {name!r} contains whole numbers of more than 2^53 in magnitude, which float64 would round: subtract a "
            "constant from all of them, or replace each by its rank"
        )
    example = next((value for value in results[name].to_pylist() if value is not None), None)
    raise ValueError(
        f"the column {name!r} contains values of type {kind}; expected numbers, not {example!r}: convert it first, classes to "
        "the same numbers in predictions and labels, as by classes.index(name)"
    )


def known_labels(label: Any, prediction: Any) -> tuple[Any, bool | None]:
    """Return the labels with NaN for negative ones, which are unknown, and whether negative labels are classes.

    They are classes if a prediction is negative too, as those of a classifier of -1 and 1.

    Args:
        label: The labels ``(N,)``, NaN where unknown.
        prediction: The predictions ``(N,)``.

    Returns:
        The labels ``(N,)``; and whether negative labels are classes, ``None`` if no label is negative.

    Example:
        >>> known_labels(np.array([-1.0, 1.0]), np.array([0.0, 1.0]))
        (array([nan,  1.]), False)
        >>> known_labels(np.array([-1.0, 1.0]), np.array([-1.0, 1.0]))
        (array([-1.,  1.]), True)
    """
    is_negative = label < 0
    if not is_negative.any():
        return label, None
    if (prediction < 0).any():
        return label, True
    return np.where(is_negative, np.nan, label), False


def score_column(results: pa.Table, name: str) -> Any:
    """Return a score as a float32 or float64 array, with NaN for null."""
    if results[name].type == pa.float32():
        return results[name].to_numpy()
    return float_column(results, name)


def finite_rows(results: pa.Table, scores: Sequence[str]) -> Any:
    """Return which rows ``(N,)`` are not flagged as not finite and have finite values of all these scores."""
    keep = np.ones(len(results), dtype=bool)
    if "finite" in results.column_names:
        keep &= np.nan_to_num(float_column(results, "finite")) != 0
    for score in scores:
        keep &= _is_finite(results, score)
    return keep


def _is_finite(results: pa.Table, name: str) -> Any:
    """Return which values ``(N,)`` of a column are finite, chunk by chunk, which copies no floating column."""
    column = results[name] if name in results.column_names else None
    if column is None or not pa.types.is_floating(column.type):
        return np.isfinite(float_column(results, name))
    finite = np.empty(len(column), dtype=bool)
    start = 0
    for chunk in column.chunks:
        np.isfinite(chunk.to_numpy(zero_copy_only=False), out=finite[start : start + len(chunk)])
        start += len(chunk)
    return finite
