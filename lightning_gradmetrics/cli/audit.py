"""The samples with the largest scores, and how many of the planted wrong labels are among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from lightning_gradmetrics.report.tables.grid import Column, Grid, Group
from lightning_gradmetrics.report.wording import short_number
from lightning_gradmetrics.results.table import largest

__all__ = ["planted_statements", "top_samples_grid", "with_planted"]


def planted_statements(results: pa.Table, scores: Sequence[str], planted: Mapping[str, frozenset[int]]) -> list[str]:
    """Return one sentence per dataset and score: how many planted labels are among the largest scores.

    Args:
        results: The per-sample results.
        scores: The scores whose largest samples are searched for planted labels.
        planted: The indices of the planted labels, by dataset.
    """
    statements = []
    for dataset, indices in planted.items():
        total = sum(name == dataset for name in results["dataset"].to_pylist())
        count = len(indices)
        for score in scores:
            top = set(largest(results, score, count, dataset)["index"].to_pylist())
            chance = count * count / total
            statements.append(
                f"{len(top & indices)} of the {count} planted labels in {dataset} are among the {count} largest {score} "
                f"({chance:.1f} expected by chance)."
            )
    return statements


def with_planted(top_samples: pa.Table, planted: Mapping[str, frozenset[int]]) -> pa.Table:
    """Return the table with a column ``planted``: whether the sample's label was planted.

    Args:
        top_samples: The result of :func:`lightning_gradmetrics.results.table.largest_of_each`.
        planted: The indices of the planted labels, by dataset.
    """
    flags = []
    for dataset, index in zip(top_samples["dataset"].to_pylist(), top_samples["index"].to_pylist(), strict=True):
        flags.append(index in planted.get(dataset, frozenset()))
    return top_samples.append_column("planted", pa.array(flags, pa.bool_()))


def top_samples_grid(top_samples: pa.Table) -> Grid:
    """Return the samples with the largest scores as a grid, with an empty line between datasets and scores.

    Args:
        top_samples: The result of :func:`lightning_gradmetrics.results.table.largest_of_each`, optionally with the
            column ``planted``.
    """
    rows = top_samples.to_pylist()
    ends = set()
    for number in range(len(rows) - 1):
        this, following = rows[number], rows[number + 1]
        if (this["score"], this["dataset"]) != (following["score"], following["dataset"]):
            ends.add(number)
    columns = [Column("dataset", _texts(rows, "dataset"), left=True)]
    for key in ("index", "label", "prediction", "value"):
        columns.append(Column(key, _texts(rows, key)))
    if "planted" in top_samples.column_names:
        columns.append(Column("planted", _texts(rows, "planted"), left=True))
    names = Column("score", _texts(rows, "score"), left=True)
    return Grid("Samples with the largest scores", names, (Group("", tuple(columns)),), frozenset(ends))


def _texts(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[str, ...]:
    return tuple(_text(row[key]) for row in rows)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else ""
    return short_number(value) if isinstance(value, float) else str(value)
