"""The protocol: what a table of per-sample scores says, with intervals, comparisons and words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from lightning_gradmetrics.evaluation.contrasts import Contrast, contrasts_of, rows_of
from lightning_gradmetrics.evaluation.metrics import HIGHER_IS_BETTER, TASKS, metrics_of
from lightning_gradmetrics.meters.functional.counts import check_rate, count

__all__ = ["HIGHER_IS_BETTER", "TASKS", "Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """What a results table says about its scores.

    Args:
        records: One dict a number: ``score``, ``task`` (``"misprediction"`` or ``"ood"``), ``dataset`` (``None`` for
            a whole group), ``group`` (the role), ``metric``, ``value``, ``low`` and ``high`` (the bootstrap interval,
            ``None`` without one), ``count_positive``, ``count_negative``. An undefined value is ``None``.
        datasets: One dict a data set: ``dataset``, ``role``, ``rows``, ``left_out``, ``labelled``, ``accuracy``.
        notes: Sentences on what was left out or is undefined, and why.
        settings: The arguments that the numbers depend on.
    """

    records: list[dict[str, Any]]
    datasets: list[dict[str, Any]]
    notes: list[str]
    settings: dict[str, Any] = field(default_factory=dict)

    def find(self, **where: Any) -> list[dict[str, Any]]:
        """The records that have all these values, such as ``score="entropy", metric="auroc"``."""
        return [record for record in self.records if all(record[key] == value for key, value in where.items())]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers, ready for JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """The evaluation as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """The evaluation that :meth:`to_dict` came from."""
        return cls(**values)


def evaluate(
    results: pa.Table,
    scores: Sequence[str],
    roles: Mapping[str, str],
    baselines: Sequence[str] = (),
    *,
    rate: float = 0.95,
) -> Evaluation:
    """Judge scores on a per-sample results table.

    Misprediction is judged on each in-distribution data set, errors being positive. Out-of-distribution detection is
    judged on every other data set, its rows being positive and the rows of all in-distribution data sets negative. A
    group with several data sets also gets the mean over them, each set weighing the same. Labels of
    out-of-distribution data are not used.

    Args:
        results: Columns ``dataset``, ``index``, ``prediction``, ``label`` (null where unknown), one a score, and
            ``finite`` (rows where it is false enter no metric).
        scores: The columns to judge, higher = more uncertain.
        roles: Each data set's role: ``"id"`` for in-distribution data, any other word for a group of
            out-of-distribution data.
        baselines: Those of ``scores`` that use no gradient.
        rate: The true-positive rate of ``fpr95``.

    Returns:
        Records, data sets and notes.

    Raises:
        ValueError: If a column, a role or a score is missing, or a row appears twice.

    Example:
        >>> columns = {"dataset": ["test"] * 3, "index": [0, 1, 2], "prediction": [0, 1, 1], "label": [0, 1, 0]}
        >>> table = pa.table({**columns, "entropy": [0.1, 0.3, 0.9], "finite": [True] * 3})
        >>> evaluation = evaluate(table, ["entropy"], {"test": "id"}, baselines=["entropy"])
        >>> evaluation.find(metric="auroc")[0]["value"]
        1.0
    """
    if unknown := [name for name in baselines if name not in scores]:
        raise ValueError(f"the baselines {unknown} are not among the scores: {', '.join(scores)}")
    check_rate(rate, "rate")
    rows, notes = rows_of(results, list(scores), roles)
    contrasts, more = contrasts_of(rows)
    records = []
    for contrast in contrasts:
        for score in scores:
            values = metrics_of(contrast.task, count(contrast.values(rows, score), contrast.target), rate)
            records += [_record(contrast, score, name, float(value)) for name, value in values.items()]
    records += _group_records(records)
    settings = {"scores": list(scores), "baselines": list(baselines), "roles": dict(roles), "rate": rate}
    return Evaluation(records, [part.summary() for part in rows.values()], notes + more, settings)


def _record(contrast: Contrast, score: str, metric: str, value: float) -> dict[str, Any]:
    positive = int(contrast.target.sum())
    return {
        "score": score,
        "task": contrast.task,
        "dataset": contrast.dataset,
        "group": contrast.group,
        "metric": metric,
        "value": None if math.isnan(value) else value,
        "low": None,
        "high": None,
        "count_positive": positive,
        "count_negative": len(contrast.target) - positive,
    }


def _group_records(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The mean over the data sets of each group that has several."""
    gathered: dict[tuple[str, str, str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        gathered.setdefault((record["score"], record["task"], record["group"], record["metric"]), []).append(record)
    return [_mean_record(members) for members in gathered.values() if len(members) > 1]


def _mean_record(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, values = members[0], [member["value"] for member in members]
    defined = None not in values
    return {
        **first,
        "dataset": None,
        "value": sum(values) / len(values) if defined else None,
        "count_positive": sum(member["count_positive"] for member in members),
        "count_negative": members[0]["count_negative"]
        if members[0]["task"] == "ood"
        else sum(m["count_negative"] for m in members),
    }
