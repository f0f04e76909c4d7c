"""The result of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from lightning_gradmetrics.classifier.hints import did_you_mean
from lightning_gradmetrics.evaluation.metrics import METRICS, SHOWN

__all__ = ["Evaluation"]

Entry = dict[str, Any]

ShownColumn = tuple[str, str, str, str]
"""A task, a group, a dataset and a metric."""

TASK_TITLES = {"misclassification": "errors", "ood": "{group}", "joint": "errors and {group}"}


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Metrics, comparisons and statements of a results table. ``metrics.json`` of a run uses the same names.

    Args:
        metrics: One dict per number: ``score``, ``task`` (``"joint"``, ``"misclassification"`` or ``"ood"``),
            ``dataset`` (``None`` for the mean over a group), ``group`` (the role), ``metric``, ``value`` (``None``
            where undefined), ``low`` and ``high`` (its interval, or ``None``), ``count_positive``, ``count_negative``
            and ``count_ood`` (the out-of-distribution rows among the positives, or ``None``).
        comparisons: One dict per score, task, dataset or group, and metric: the difference to the baseline with its
            interval and ``verdict``, and the max-adjusted verdict against the best baseline; see
            :func:`~lightning_gradmetrics.evaluation.comparisons.compare`.
        statements: For each task and dataset or group, a sentence on which scores are better than the baseline.
        datasets: One dict per dataset: ``name``, ``role``, ``rows``, ``not_finite``, ``labelled``, ``accuracy``.
        notes: Sentences about rows that were dropped and metrics that are undefined, with reasons.
        settings: The arguments that the numbers depend on, and how the bootstrap was computed.

    Example:
        >>> entry = {"score": "entropy", "task": "ood", "dataset": "svhn", "metric": "auroc", "value": 0.9}
        >>> evaluation = Evaluation([entry], [], [], [], [], {})
        >>> evaluation
        Evaluation(1 scores, 0 datasets, 1 metrics, 0 comparisons)
        >>> evaluation.find(score="entropy", metric="auroc")[0]["value"]
        0.9
    """

    metrics: list[Entry]
    comparisons: list[Entry]
    statements: list[str]
    datasets: list[Entry]
    notes: list[str]
    settings: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return one line with the numbers of entries."""
        scores = len({entry["score"] for entry in self.metrics})
        return (
            f"Evaluation({scores} scores, {len(self.datasets)} datasets, {len(self.metrics)} metrics, "
            f"{len(self.comparisons)} comparisons)"
        )

    def find(self, **where: Any) -> list[Entry]:
        """Return the metrics that have all these values, such as ``score="entropy", metric="auroc"``.

        Args:
            where: Keys of a metric and the wanted values; ``dataset=None`` finds the means over groups.

        Returns:
            The matching entries of ``metrics``; empty if the values are known but do not occur together.

        Raises:
            KeyError: If a key is unknown.
            ValueError: If no metric has one of the values.
        """
        for key, value in where.items():
            if self.metrics:
                self._check(key, value)
        matching = self.metrics
        for key, value in where.items():
            matching = [entry for entry in matching if entry[key] == value]
        return list(matching)

    def _check(self, key: str, value: Any) -> None:
        keys = list(self.metrics[0])
        if key not in keys:
            raise KeyError(f"unknown key {key!r};{did_you_mean(key, keys)} the keys of a metric are {', '.join(keys)}")
        values = list(dict.fromkeys(entry[key] for entry in self.metrics))
        allowed: dict[str, Iterable[str]] = {"metric": METRICS, "task": SHOWN}
        known = {*values, *allowed.get(key, ())}
        if key == "dataset":
            known |= {None, *(summary["name"] for summary in self.datasets)}
        if key in ("score", "task", "dataset", "group", "metric") and value not in known:
            listed = ", ".join(map(str, values))
            raise ValueError(f"no metric has {key}={value!r};{did_you_mean(value, values)} the values are {listed}")

    def to_pandas(self) -> Any:
        """Return the metrics as a pandas data frame with one row per number."""
        import pandas as pd

        return pd.DataFrame(self.metrics)

    def _repr_html_(self) -> str:
        """Return the main table as HTML: one row per score, times 100, with intervals."""
        columns = self._shown_columns()
        cells: dict[tuple[str, ShownColumn], str] = {}
        for entry in self.metrics:
            cells[entry["score"], _column(entry)] = _cell(entry)
        head = "".join(f"<th>{_title(column)}</th>" for column in columns)
        rows = []
        for score in dict.fromkeys(entry["score"] for entry in self.metrics):
            row = "".join(f"<td>{cells.get((score, column), '')}</td>" for column in columns)
            rows.append(f"<tr><th>{escape(score)}</th>{row}</tr>")
        return f"<table><thead><tr><th>score</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"

    def _shown_columns(self) -> list[ShownColumn]:
        """Return the columns of the main table: errors, then each group of other datasets, then both together."""
        columns = []
        for entry in self.metrics:
            if entry["dataset"] is not None and entry["metric"] in SHOWN[entry["task"]]:
                columns.append(_column(entry))
        return sorted(dict.fromkeys(columns), key=lambda column: list(TASK_TITLES).index(column[0]))

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts, strings and numbers, ready for JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """Return the evaluation as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation from the result of :meth:`to_dict`."""
        return cls(**values)


def _column(entry: Entry) -> ShownColumn:
    return entry["task"], entry.get("group") or "", entry["dataset"], entry["metric"]


def _title(column: ShownColumn) -> str:
    task, group, dataset, metric = column
    arrow = "↑" if METRICS[metric].higher_is_better else "↓"
    title = TASK_TITLES[task].format(group=group)
    return f"{escape(title)}:<br>{escape(dataset)}<br>{escape(METRICS[metric].title)} {arrow}"


def _cell(entry: Entry) -> str:
    if entry["value"] is None:
        return "–"
    digits = METRICS[entry["metric"]].digits
    text = f"{100 * entry['value']:.{digits}f}"
    if entry.get("low") is None:
        return text
    return f"{text}<br><small>{100 * entry['low']:.{digits}f} to {100 * entry['high']:.{digits}f}</small>"
