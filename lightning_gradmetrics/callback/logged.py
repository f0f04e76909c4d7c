"""Selects and names the metrics that a run logs: short names that every logger accepts, the same in every epoch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["logged_metrics", "plain_name", "plain_names"]


def plain_name(name: str) -> str:
    """Return a name without brackets, quotes and equals signs, which some loggers refuse.

    Example:
        >>> plain_name("pseudo_label(target=all,statistic='l2')"), plain_name("energy")
        ('pseudo_label.target_all.statistic_l2', 'energy')
    """
    opened = re.sub(r"\s*[(,]\s*", ".", name)
    return re.sub(r"[^\w./-]+", "_", re.sub(r"['\")\]]", "", opened)).strip("._")


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Return the plain form of each name; duplicates get a number."""
    plain: dict[str, str] = {}
    for name in names:
        made, number = plain_name(name), 2
        while made in plain.values():
            made, number = f"{plain_name(name)}_{number}", number + 1
        plain[name] = made
    return plain


def logged_metrics(
    records: Iterable[Mapping[str, Any]], prefix: str, metrics: Sequence[str], before: Iterable[str] = ()
) -> dict[str, float]:
    """Return the metrics by their logged names, ``prefix/dataset/score/task_metric``, NaN where a metric is undefined.

    The mean over a group of datasets has the name of the group instead of a dataset's.

    Args:
        records: The metrics of an :class:`~lightning_gradmetrics.evaluation.Evaluation`.
        prefix: The start of the names.
        metrics: The metrics to log: ``"auroc"`` for every task except the joint one, or ``"joint_auroc"`` for one task.
        before: Names that were logged in earlier epochs and must be logged again.

    Example:
        >>> record = {"dataset": "test", "group": "id", "score": "energy", "task": "ood", "metric": "auroc", "value": None}
        >>> logged_metrics([record], "mine", ["auroc"])
        {'mine/test/energy/ood_auroc': nan}
    """
    chosen = [record for record in records if _is_logged(record, metrics)]
    scores = plain_names(dict.fromkeys(record["score"] for record in chosen))
    values = dict.fromkeys(before, math.nan)
    for record in chosen:
        dataset = plain_name(record["dataset"] or record["group"])
        key = f"{prefix}/{dataset}/{scores[record['score']]}/{record['task']}_{record['metric']}"
        values[key] = math.nan if record["value"] is None else record["value"]
    return values


def _is_logged(record: Mapping[str, Any], metrics: Sequence[str]) -> bool:
    is_named = f"{record['task']}_{record['metric']}" in metrics
    return is_named or (record["metric"] in metrics and record["task"] != "joint")
