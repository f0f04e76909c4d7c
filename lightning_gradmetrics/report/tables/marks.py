"""Marks for scores that use a fit, labels or out-of-distribution samples in addition to the model."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_gradmetrics.scores import FittedScore, Score

__all__ = ["MARKS", "detects", "kind_of", "mark_notes", "mark_of", "passes_of"]

MARKS = {
    "fitted": "f",
    "fitted on labels": "fl",
    "fitted on OOD samples": "fo",
    "reads labels": "L",
}
"""The mark of each kind of score; other scores have none."""

MEANINGS = {
    "f": "fitted on held-out samples",
    "fl": "fitted on held-out samples and their labels",
    "fo": "fitted on held-out and out-of-distribution samples",
    "L": "reads the true label of the sample it scores, so it has detection metrics for texts only",
}


def kind_of(score: Score) -> str:
    """Return the kind of a score by the data that it uses in addition to the model: a key of :data:`MARKS`, or ``""``."""
    if score.needs.labels:
        return "reads labels"
    if not isinstance(score, FittedScore):
        return ""
    needs = score.fit_needs
    if needs.ood:
        return "fitted on OOD samples"
    return "fitted on labels" if needs.labels else "fitted"


def detects(score: Score) -> bool:
    """Return whether a score can be evaluated as a detector, which must not read the label of the sample it scores."""
    return not score.needs.labels


def mark_of(score: Score) -> str:
    """Return the mark of a score in tables: the data that it uses, and its forward passes if not one; ``""`` for none.

    Example:
        >>> from lightning_gradmetrics.scoring.registry import make
        >>> mark_of(make("knn")), mark_of(make("views(score=energy)"))
        ('f', '×10')
    """
    return " ".join(filter(None, (MARKS.get(kind_of(score), ""), passes_of(score))))


def passes_of(score: Score) -> str:
    """Return ``×n`` for a score that takes n forward passes, ``×?`` if their number is unknown, and ``""`` for one pass."""
    forwards = score.needs.forwards
    if forwards == 1:
        return ""
    return "×?" if forwards is None else f"×{forwards}"


def mark_notes(scores: Iterable[Score]) -> list[str]:
    """Return a list with one sentence that explains the marks in use, or an empty list."""
    listed = list(scores)
    used = {MARKS.get(kind_of(score), "") for score in listed}
    meanings = []
    for mark, meaning in MEANINGS.items():
        if mark in used:
            meanings.append(f"{mark}: {meaning}")
    if any(map(passes_of, listed)):
        meanings.append("×n: n forward passes instead of one, so comparisons are not at equal cost")
    return ["; ".join(meanings) + "."] if meanings else []
