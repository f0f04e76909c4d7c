"""Answers each question: the best score, its gain over the baselines, and one sentence of advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_gradmetrics.report.questions import REFERENCE, Question, place_of
from lightning_gradmetrics.report.run import Metric, Run
from lightning_gradmetrics.report.wording import signed

__all__ = ["Answer", "Difference", "answers", "differences_of"]


@dataclass(frozen=True)
class Difference:
    """The value of a score minus that of a baseline, with its interval and verdict (empty without an interval)."""

    baseline: str
    value: float | None
    low: float | None = None
    high: float | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Answer:
    """A question with the differences of its best score to the baselines, and a sentence of advice."""

    question: Question
    differences: tuple[Difference, ...]
    advice: str


Differences = dict[tuple[str, str, str, str | None, str], Difference]
"""Differences by score, baseline, task, dataset and group."""


def differences_of(run: Run) -> Differences:
    """Return the differences in AUROC to the named baseline and to the best baseline on the data."""
    differences: Differences = {}
    for entry in run.comparisons:
        if entry.metric == "auroc":
            task_and_dataset = place_of(run, Metric(entry.score, entry.task, "auroc", None, entry.dataset, entry.group))
            if entry.best_baseline is not None:
                ends = (entry.max_adjusted_low, entry.max_adjusted_high, entry.max_adjusted_verdict or "")
                differences.setdefault(
                    (entry.score, entry.best_baseline, *task_and_dataset), Difference(entry.best_baseline, None, *ends)
                )
            differences[(entry.score, entry.baseline, *task_and_dataset)] = Difference(
                entry.baseline, entry.difference, entry.low, entry.high, entry.verdict
            )
    return differences


def answers(run: Run, questions: Sequence[Question]) -> list[Answer]:
    """Return the answer to each question.

    Args:
        run: The run.
        questions: The result of :func:`~lightning_gradmetrics.report.questions.find_questions`.

    Returns:
        One answer per question, in the same order.
    """
    differences = differences_of(run)
    answered = []
    for question in questions:
        answered.append(
            Answer(question, _differences(question, differences), _advice(question, differences, _cost(run, question)))
        )
    return answered


def _cost(run: Run, question: Question) -> str:
    """Return a sentence on the forward passes of the best score if they are not those of the best baseline."""
    if question.best_baseline is None:
        return ""
    best, baseline = run.score(question.best), run.score(question.best_baseline)
    if best.forwards == baseline.forwards:
        return ""
    passes, instead = best.forwards or "an unknown number of", baseline.forwards or "an unknown number"
    return f" It takes {passes} forward passes instead of {instead}."


def _differences(question: Question, found: Differences) -> tuple[Difference, ...]:
    best, baseline = question.best, question.best_baseline
    differences = []
    for rival in dict.fromkeys((REFERENCE, baseline)):
        if rival is not None and rival in question.metrics and rival != best:
            differences.append(_difference(question, best, rival, found))
    return tuple(differences)


def _difference(question: Question, score: str, baseline: str, found: Differences) -> Difference:
    value = _value(question, score) - _value(question, baseline)
    known = found.get((score, baseline, *question.place))
    return replace(known, value=value) if known else Difference(baseline, value)


def _value(question: Question, score: str) -> float:
    return question.metrics[score].value or 0.0


def _advice(question: Question, found: Differences, cost: str) -> str:
    """Return a sentence that recommends the simplest score with a measurable gain; ``cost`` follows if that is the best one."""
    best, baseline, title = question.best, question.best_baseline, question.title
    if baseline is None:
        return f"{title}: {best} has the highest AUROC; the run has no baseline to compare with."
    gain = _difference(question, best, baseline, found)
    if best != baseline and not gain.verdict:
        return f"{title}: {best} leads {baseline} by {signed(gain.value)}; without intervals, that may be chance.{cost}"
    if best != baseline and gain.verdict == "better":
        return f"{title}: use {best} ({signed(gain.value)} over {baseline}, the best baseline).{cost}"
    if REFERENCE not in question.metrics or baseline == REFERENCE:
        return f"{title}: use {baseline}; nothing is measurably better."
    simple = _difference(question, baseline, REFERENCE, found)
    if simple.verdict == "better":
        rest = "" if best == baseline else f"; {best} is not measurably better"
        return f"{title}: use {baseline} ({signed(simple.value)} over {REFERENCE}{rest})."
    whole = _difference(question, best, REFERENCE, found)
    if whole.verdict == "better":
        return f"{title}: use {best} ({signed(whole.value)} over {REFERENCE}; not measurably better than {baseline}).{cost}"
    return f"{title}: {REFERENCE} is enough; nothing is measurably better."
