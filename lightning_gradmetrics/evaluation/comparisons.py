"""Scores against the best baseline, and what the data say about it in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_gradmetrics.evaluation.bootstrap import Replicates, interval
from lightning_gradmetrics.evaluation.metrics import HIGHER_IS_BETTER

__all__ = ["compare", "statements_of"]

Record = Mapping[str, Any]


def compare(
    records: Sequence[Record], replicates: Replicates, baselines: Sequence[str], level: float
) -> list[dict[str, Any]]:
    """Each score that is no baseline against the best baseline, for every task, data set or group, and metric.

    The best baseline is chosen again inside each resample, so the interval holds the uncertainty of the choice. The
    best of several noisy baselines is on average better on its own resample than any one of them is in truth, and the
    more so the more baselines there are: the interval leans against the score, never in its favour. Intervals are not
    corrected for the number of scores.

    Args:
        records: Records of all scores.
        replicates: Their values in each resample.
        baselines: The scores to compare with.
        level: The level of the interval.

    Returns:
        One dict a comparison: ``score``, ``baseline`` (the best on the data), ``task``, ``dataset``, ``group``,
        ``metric``, ``value``, ``baseline_value``, ``difference`` (above 0 = the score is better, also where lower is
        better), ``low``, ``high``, and
        ``verdict``: ``"better"``, ``"worse"`` or ``"cannot tell"``.
    """
    return [
        comparison
        for record in records
        if record["score"] not in baselines and record["value"] is not None
        for comparison in _comparison(record, records, replicates, baselines, level)
    ]


def _comparison(
    record: Record, records: Sequence[Record], replicates: Replicates, baselines: Sequence[str], level: float
) -> list[dict[str, Any]]:
    same = ("task", "dataset", "group", "metric")
    rivals = [
        rival
        for rival in records
        if rival["score"] in baselines and rival["value"] is not None and all(rival[key] == record[key] for key in same)
    ]
    if not rivals:
        return []
    sign = 1 if HIGHER_IS_BETTER[record["metric"]] else -1
    best = max(rivals, key=lambda rival: sign * rival["value"])
    place = (record["task"], record["dataset"], record["group"])
    own, *others = (sign * replicates[(*place, each["score"], each["metric"])] for each in (record, *rivals))
    low, high = interval(own - torch.stack(others).amax(0), level)
    return [
        {
            "score": record["score"],
            "baseline": best["score"],
            **{key: record[key] for key in same},
            "value": record["value"],
            "baseline_value": best["value"],
            "difference": sign * (record["value"] - best["value"]),
            "low": low,
            "high": high,
            "verdict": _verdict(low, high),
        }
    ]


def _verdict(low: float | None, high: float | None) -> str:
    if low is None or high is None or low <= 0 <= high:
        return "cannot tell"
    return "better" if low > 0 else "worse"


OPENINGS = {
    "better": "better than the best baseline",
    "worse": "worse than the best baseline",
    "cannot tell": "cannot tell",
}


LISTED = 6
"""How many scores a sentence names for each verdict."""


def statements_of(comparisons: Sequence[Record], level: float) -> list[str]:
    """A sentence for each task and data set or group: what beats the best baseline, what does not, and what is open.

    Judged by AUROC, in points of 100.
    """
    places: dict[tuple[str, str | None, str], list[Record]] = {}
    for comparison in comparisons:
        if comparison["metric"] == "auroc":
            places.setdefault((comparison["task"], comparison["dataset"], comparison["group"]), []).append(comparison)
    return [_sentence(*place, members, level) for place, members in places.items()]


def _sentence(task: str, dataset: str | None, group: str, members: Sequence[Record], level: float) -> str:
    where = f'"{dataset}"' if dataset is not None else f'the mean over the group "{group}"'
    what = "Misclassification" if task == "misclassification" else "Out-of-distribution detection"
    baseline, value = members[0]["baseline"], 100 * members[0]["baseline_value"]
    parts = []
    for verdict, words in OPENINGS.items():
        if found := [member for member in members if member["verdict"] == verdict]:
            parts.append(f"{words}: {_listed(found)}")
    head = f"{what} on {where}: the best baseline is {baseline}, AUROC {value:.1f}"
    return f"{head}. {_capital('; '.join(parts))} ({100 * level:g} % intervals)."


def _listed(members: Sequence[Record]) -> str:
    """The scores with their differences; of many the first few, how many more, and how far down they go."""
    ordered = sorted(members, key=lambda member: -member["difference"])
    if len(ordered) <= LISTED + 1:
        return ", ".join(map(_named, ordered))
    first, last = ", ".join(map(_named, ordered[:LISTED])), _named(ordered[-1])
    return f"{first}, and {len(ordered) - LISTED} more, down to {last}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _named(member: Record) -> str:
    name, difference = member["score"], 100 * member["difference"]
    if member["low"] is None:
        return f"{name} ({difference:+.1f}, no interval)"
    return f"{name} ({difference:+.1f} [{100 * member['low']:+.1f}, {100 * member['high']:+.1f}])"
