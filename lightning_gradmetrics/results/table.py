"""Functions of per-sample results, which are pyarrow tables with one row per sample: merged, joined, and the largest scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

__all__ = [
    "RESERVED",
    "join_scores",
    "largest",
    "largest_of_each",
    "merge_results",
    "with_scores",
]


def merge_results(tables: Sequence[pa.Table], datasets: Sequence[str]) -> pa.Table:
    """Merge the tables of several processes or datasets, ordered by dataset and index."""
    filled = [table for table in tables if table.num_rows]
    merged = pa.concat_tables(filled or tables[:1])
    if not merged.num_rows:
        return merged
    order = pc.index_in(merged["dataset"], pa.array(list(datasets), pa.string()))
    if _is_ordered(order, merged["index"]):
        return merged
    ordered = merged.append_column("_order", order).sort_by([("_order", "ascending"), ("index", "ascending")])
    return ordered.drop_columns(["_order"])


def _is_ordered(first: pa.ChunkedArray, second: pa.ChunkedArray) -> bool:
    """Return whether rows are in ascending order of two columns of whole numbers without nulls."""
    if first.null_count or second.null_count:
        return False
    steps, further = np.diff(first.to_numpy()), np.diff(second.to_numpy())
    return bool(np.all((steps > 0) | (steps == 0) & (further >= 0)))


KEYS = ("dataset", "index", "prediction", "label", "sample_id")
RESERVED = (*KEYS, "finite")
"""Columns that every table of results may have, whatever is scored."""


def with_scores(results: pa.Table, columns: Mapping[str, Tensor]) -> pa.Table:
    """Return the table with additional scores ``(N,)`` before ``finite``, which becomes false where one is not finite.

    Args:
        results: A results table.
        columns: The scores by name, in the order of the rows.

    Raises:
        ValueError: If the table has a column of that name.
    """
    for name, values in columns.items():
        if name in results.column_names:
            raise ValueError(f"the results already have a column {name!r}: rename the score")
        values = values.detach().cpu().double()
        finite = pc.and_(results["finite"], pa.array(values.isfinite().numpy()))
        results = results.drop_columns(["finite"]).append_column(name, pa.array(values.numpy()))
        results = results.append_column("finite", finite)
    return results


def join_scores(first: pa.Table, second: pa.Table) -> pa.Table:
    """Return the first table with the scores of a second table of the same samples in the same order.

    Raises:
        ValueError: If the samples differ.
    """
    if not first.select(["dataset", "index"]).equals(second.select(["dataset", "index"])):
        raise ValueError("the two results tables are not of the same samples in the same order")
    scores = [name for name in second.column_names if name not in (*KEYS, "finite")]
    return with_scores(first, {name: torch.from_numpy(second[name].to_numpy().copy()) for name in scores})


def largest(results: pa.Table, score: str, n: int = 20, dataset: str | None = None) -> pa.Table:
    """Return the samples with the largest values of a score, the largest first, for an audit of the data.

    Rows with NaN or Inf are left out. Among equal values, the sample with the lower index comes first.

    Args:
        results: A per-sample table, such as ``callback.results``.
        score: The name of the score's column.
        n: The largest number of samples.
        dataset: The dataset; by default all datasets, one after the other.

    Returns:
        The columns ``dataset``, ``index``, ``label``, ``prediction``, and the score under its name.

    Raises:
        ValueError: If there is no such column or dataset, or ``n`` is below 1.

    Example:
        >>> columns = {"dataset": ["train"] * 3, "index": [0, 1, 2], "prediction": [0, 1, 1], "label": [0, 1, 0]}
        >>> table = pa.table({**columns, "entropy": [0.1, 0.3, 0.9], "finite": [True] * 3})
        >>> largest(table, "entropy", n=2)["index"].to_pylist()
        [2, 1]
    """
    names = pc.unique(results["dataset"]).to_pylist()
    fields = [f.name for f in results.schema if pa.types.is_floating(f.type)]
    if score not in fields:
        raise ValueError(f"the results have no score {score!r}; available: {', '.join(fields) or 'none'}")
    if dataset is not None and dataset not in names:
        raise ValueError(f"the results have no dataset {dataset!r}; available: {', '.join(names) or 'none'}")
    if n < 1:
        raise ValueError(f"n is {n}; expected at least 1 sample")
    known = results.filter(results["finite"]).select(["dataset", "index", "label", "prediction", score])
    ordered = known.sort_by([(score, "descending"), ("index", "ascending")])
    parts = [
        ordered.filter(pc.equal(ordered["dataset"], name)).slice(0, n) for name in names if dataset in (None, name)
    ]
    return pa.concat_tables(parts) if parts else known


def largest_of_each(results: pa.Table, counts: Mapping[str, int]) -> pa.Table:
    """Return the results of :func:`largest` for several scores in one table, with the columns ``score`` and ``value``.

    Args:
        results: A per-sample table.
        counts: The number of samples of each dataset, by score.
    """
    parts = []
    for score, count in counts.items():
        top_samples = largest(results, score, count)
        named = top_samples.rename_columns([*top_samples.column_names[:-1], "value"])
        parts.append(named.add_column(1, "score", pa.array([score] * named.num_rows, pa.string())))
    return pa.concat_tables(parts)
