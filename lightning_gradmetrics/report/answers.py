"""The answer to each question: the best score, what it gains over baselines, and one sentence of advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_gradmetrics.evaluation import evaluate
from lightning_gradmetrics.report.questions import REFERENCE, Question, place_of
from lightning_gradmetrics.report.reading import record_of
from lightning_gradmetrics.report.run import Comparison, Metric, Run
from lightning_gradmetrics.report.wording import signed

__all__ = ["Answer", "Difference", "answers", "differences_of"]


@dataclass(frozen=True)
class Difference:
    """A score's value minus a baseline's, with its interval and verdict (empty without an interval)."""

    baseline: str
    value: float | None
    low: float | None = None
    high: float | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Answer:
    """A question with the differences of its best score, and the score that is advised."""

    question: Question
    differences: tuple[Difference, ...]
    advice: str


Differences = dict[tuple[str, str, str, str | None, str], Difference]
"""By score, baseline, task, dataset and group."""


def difference_of(entry: Comparison) -> Difference:
    """Return the true difference of a comparison: the score's value minus the baseline's, whatever is better.

    A file may store the improvement, which has the other sign for metrics of which less is better.
    """
    if entry.value is None or entry.baseline_value is None or entry.difference is None:
        return Difference(entry.baseline, entry.difference, entry.low, entry.high, entry.verdict)
    true = entry.value - entry.baseline_value
    if true * entry.difference >= 0 or entry.low is None or entry.high is None:
        return Difference(entry.baseline, true, entry.low, entry.high, entry.verdict)
    return Difference(entry.baseline, true, -entry.high, -entry.low, entry.verdict)


def differences_of(run: Run, comparisons: Sequence[Comparison], metric: str = "auroc") -> Differences:
    """Return the differences in one metric."""
    found = {}
    for entry in comparisons:
        if entry.metric == metric:
            place = place_of(run, Metric(entry.score, entry.task, metric, None, entry.dataset, entry.group))
            found[(entry.score, entry.baseline, *place)] = difference_of(entry)
    return found


RESAMPLES = 500
"""At most this many resamples for the differences to max softmax."""


def against_reference(run: Run, names: Sequence[str]) -> Differences:
    """Return the paired differences between scores and max softmax, with the run's settings."""
    resamples = run.settings.get("resamples", 0)
    compared = dict.fromkeys(names)
    compared.pop(REFERENCE, None)
    is_described = set(run.rows) == set(run.roles) and all(run.roles.values())
    if not resamples or REFERENCE not in run.detectors or not compared or not is_described:
        return {}
    evaluation = evaluate(
        run.results,
        [*compared, REFERENCE],
        run.roles,
        [REFERENCE],
        rate=run.settings.get("rate", 0.95),
        resamples=min(resamples, RESAMPLES),
        level=run.settings.get("level", 0.95),
        seed=run.settings.get("seed", 0),
    )
    comparisons = []
    for entry in evaluation.comparisons:
        comparisons.append(record_of(Comparison, entry, "comparisons"))
    return differences_of(run, comparisons)


def answers(run: Run, questions: Sequence[Question]) -> list[Answer]:
    """Return the answer to each question.

    Args:
        run: The run.
        questions: From :func:`~lightning_gradmetrics.report.questions.find_questions`.

    Returns:
        One answer per question, in their order.
    """
    found = differences_of(run, run.comparisons)
    names = []
    for question in questions:
        names += [question.best, question.best_baseline or question.best]
    found = found | against_reference(run, names)
    given = []
    for question in questions:
        given.append(_answer(question, found))
    return given


def _answer(question: Question, found: Differences) -> Answer:
    best, baseline = question.best, question.best_baseline
    differences = []
    for rival in dict.fromkeys((REFERENCE, baseline)):
        if rival is not None and rival in question.metrics and rival != best:
            differences.append(_difference(question, best, rival, found))
    return Answer(question, tuple(differences), _advice(question, found))


def _difference(question: Question, score: str, baseline: str, found: Differences) -> Difference:
    key = (score, baseline, *question.place)
    if key in found:
        return found[key]
    return Difference(baseline, _value(question, score) - _value(question, baseline))


def _value(question: Question, score: str) -> float:
    return question.metrics[score].value or 0.0


def _advice(question: Question, found: Differences) -> str:
    """Return a sentence that advises the simplest score with a measurable gain over simpler ones."""
    best, baseline, title = question.best, question.best_baseline, question.title
    if baseline is None:
        return f"{title}: {best} has the highest AUROC; the run has no baseline to compare with."
    gain = _difference(question, best, baseline, found)
    if best != baseline and not gain.verdict:
        return f"{title}: {best} leads {baseline} by {signed(gain.value)}; without intervals, that may be chance."
    if best != baseline and gain.verdict == "better":
        return f"{title}: use {best} ({signed(gain.value)} over {baseline}, the best baseline)."
    if REFERENCE not in question.metrics or baseline == REFERENCE:
        return f"{title}: use {baseline}; nothing is measurably better."
    simple = _difference(question, baseline, REFERENCE, found)
    if simple.verdict == "better":
        rest = "" if best == baseline else f"; {best} is not measurably better"
        return f"{title}: use {baseline} ({signed(simple.value)} over {REFERENCE}{rest})."
    whole = _difference(question, best, REFERENCE, found)
    if whole.verdict == "better":
        return f"{title}: use {best} ({signed(whole.value)} over {REFERENCE}; not measurably better than {baseline})."
    return f"{title}: {REFERENCE} is enough; nothing is measurably better."
