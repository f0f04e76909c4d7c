"""Converts a results table of texts to one row per token."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["LIST_PREFIX", "RENAMED", "SEQUENCE", "has_tokens", "token_table"]

LIST_PREFIX = "tokens/"
"""Prefix of list columns with a score for every token."""

SEQUENCE = "sequence"
"""The column of :func:`token_table` that numbers the texts."""

RENAMED = {"positions": "position", "predicted_ids": "prediction", "token_ids": "label"}
"""List columns that are not scores, and the names of the token columns that they become."""


def has_tokens(results: pa.Table) -> bool:
    """Return whether a results table is of texts, with lists of token values."""
    return "token_ids" in results.column_names


def token_table(results: pa.Table) -> pa.Table:
    """Return one row per scored token of a results table of texts.

    Args:
        results: The results of a run over texts, with the columns ``token_ids``, ``predicted_ids``, ``positions`` and
            ``tokens/<score>``, such as ``callback.results`` or the result of
            :func:`lightning_gradmetrics.read_results`.

    Returns:
        The columns ``dataset``; ``index``, the text's index in the dataset; ``sequence``, the number of the text's row;
        ``position``, the token's position in the text; ``label``, the token; ``prediction``, the most probable token; one
        column per score; and ``finite``.

    Raises:
        ValueError: If the results are not of texts.

    Example:
        >>> columns = {"dataset": ["a", "a"], "index": [0, 1], "token_ids": [[3, 4], [5]], "predicted_ids": [[3, 3], [5]]}
        >>> table = pa.table({**columns, "positions": [[1, 2], [1]], "tokens/entropy": [[0.1, 0.9], [0.2]]})
        >>> token_table(table).select(["sequence", "position", "label", "prediction", "entropy"]).to_pylist()[1]
        {'sequence': 0, 'position': 2, 'label': 4, 'prediction': 3, 'entropy': 0.9}
    """
    if not has_tokens(results):
        raise ValueError("the results have no column token_ids: they are not of texts, so they have no tokens")
    lists = results["token_ids"].combine_chunks()
    parents = pc.list_parent_indices(lists)
    columns = {
        "dataset": results["dataset"].take(parents),
        "index": results["index"].take(parents),
        SEQUENCE: parents.cast(pa.int64()),
    }
    for name, renamed in RENAMED.items():
        columns[renamed] = pc.list_flatten(results[name].combine_chunks())
    finite = np.ones(len(parents), dtype=bool)
    for name in results.column_names:
        if name.startswith(LIST_PREFIX):
            values = pc.list_flatten(results[name].combine_chunks())
            columns[name.removeprefix(LIST_PREFIX)] = values
            finite &= np.isfinite(values.to_numpy(zero_copy_only=False))
    return pa.table({**columns, "finite": finite})
