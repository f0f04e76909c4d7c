"""Writes sentences about the comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_gradmetrics.evaluation.comparisons import BETTER, CANNOT_TELL, WORSE
from lightning_gradmetrics.evaluation.metrics import JOINT, MISCLASSIFICATION, OOD

__all__ = ["statements_of"]

Comparison = Mapping[str, Any]

TITLES = {JOINT: "Errors and OOD data together", MISCLASSIFICATION: "Misclassification", OOD: "OOD detection"}

LISTED = 6
"""The number of scores that a sentence names for each verdict."""


def statements_of(comparisons: Sequence[Comparison], level: float) -> list[str]:
    """Return one sentence per task and dataset or group, on the scores that are better or worse than the baseline.

    The metric is AUROC; differences are in points (AUROC times 100).

    Args:
        comparisons: The result of :func:`~lightning_gradmetrics.evaluation.comparisons.compare`.
        level: The level of the intervals.
    """
    comparisons_of_task: dict[tuple[str, str | None, str], list[Comparison]] = {}
    for comparison in comparisons:
        if comparison["metric"] == "auroc":
            task_and_dataset = (comparison["task"], comparison["dataset"], comparison["group"])
            comparisons_of_task.setdefault(task_and_dataset, []).append(comparison)
    statements = []
    for (task, dataset, group), members in comparisons_of_task.items():
        where = f'"{dataset}"' if dataset is not None else f'the mean over the group "{group}"'
        statements.append(_statement(f"{TITLES[task]} on {where}", members, level))
    return statements


def _statement(head: str, members: Sequence[Comparison], level: float) -> str:
    baseline, value = members[0]["baseline"], 100 * members[0]["baseline_value"]
    parts = []
    for verdict in (BETTER, WORSE, CANNOT_TELL):
        named = [member for member in members if member["verdict"] == verdict]
        if named:
            parts.append(f"{verdict}: {_listed(named)}")
    words = "; ".join(parts)
    text = f"{head}: {baseline} has AUROC {value:.1f}. {words[:1].upper()}{words[1:]} ({100 * level:g} % intervals)."
    best = [member["score"] for member in members if member["max_adjusted_verdict"] == BETTER]
    if best:
        text += f" Better than every baseline, max-adjusted: {', '.join(best[:LISTED])}{_more(best)}."
    return text


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - LISTED} more" if len(names) > LISTED else ""


def _listed(members: Sequence[Comparison]) -> str:
    """Return the scores with their differences; if there are many, the first few, the number of the rest, and the last."""
    ordered = sorted(members, key=lambda member: -member["difference"])
    if len(ordered) <= LISTED + 1:
        return ", ".join(map(_named, ordered))
    first, last = ", ".join(map(_named, ordered[:LISTED])), _named(ordered[-1])
    return f"{first}, and {len(ordered) - LISTED} more, down to {last}"


def _named(member: Comparison) -> str:
    name, difference = member["score"], 100 * member["difference"]
    if member["low"] is None:
        return f"{name} ({difference:+.1f}, no interval)"
    return f"{name} ({difference:+.1f} [{100 * member['low']:+.1f}, {100 * member['high']:+.1f}])"
