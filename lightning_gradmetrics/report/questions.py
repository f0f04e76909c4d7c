"""The questions of a run: errors, near OOD, far OOD, with the AUROC of every score on each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_gradmetrics.report.run import Metric, Run
from lightning_gradmetrics.report.wording import number, question_title, whole

__all__ = ["REFERENCE", "TASK_ORDER", "Place", "Question", "find_questions", "group_of", "place_of"]

REFERENCE = "max_softmax"
"""The baseline that every paper compares with."""

TASK_ORDER = ("misclassification", "ood", "joint")
"""The order of the cards; joint questions come last."""

Place = tuple[str, str | None, str]
"""A task, a dataset (None for the mean over a group), and a group."""


@dataclass(frozen=True)
class Question:
    """A task on one group of datasets, and the AUROC of each score, best first."""

    task: str
    group: str
    dataset: str | None
    datasets: tuple[str, ...]
    metrics: Mapping[str, Metric]
    baselines: tuple[str, ...]

    @property
    def title(self) -> str:
        """The title, such as 'Far OOD'."""
        return question_title(self.task, self.group)

    @property
    def place(self) -> Place:
        """The task, dataset and group of its metrics."""
        return self.task, self.dataset, self.group

    @property
    def description(self) -> str:
        """A description of what is detected, with the number of samples."""
        first = next(iter(self.metrics.values()))
        positive, negative = whole(first.count_positive), whole(first.count_negative)
        names = ", ".join(self.datasets)
        if self.task == "misclassification":
            return f"{positive} incorrect against {negative} correct predictions on {names}"
        if self.task == "joint":
            return f"incorrect predictions and {names} against {negative} correct predictions"
        if self.task == "ood":
            mean = ", mean over datasets" if len(self.datasets) > 1 else ""
            return f"{positive} samples of {names} against {negative} in-distribution samples{mean}"
        return f"{positive} positives against {negative} negatives on {names}"

    @property
    def best(self) -> str:
        """The score with the highest AUROC."""
        return next(iter(self.metrics))

    @property
    def best_baseline(self) -> str | None:
        """The baseline with the highest AUROC."""
        return next((name for name in self.metrics if name in self.baselines), None)

    def leaders(self, count: int = 3) -> list[str]:
        """Return max softmax and the best scores, which curves highlight."""
        names = list(self.metrics)
        if REFERENCE not in names:
            return names[:count]
        names.remove(REFERENCE)
        return [REFERENCE, *names[:count]]


def group_of(run: Run, metric: Metric) -> str:
    """Return the stored group of a metric, or else the role of its dataset."""
    return metric.group or run.role_of(metric.dataset or "")


def place_of(run: Run, metric: Metric) -> Place:
    """Return the task, dataset and group of a metric; a dataset without a description counts as a group."""
    dataset = metric.dataset if metric.dataset in run.roles else None
    return metric.task, dataset, group_of(run, metric)


def find_questions(run: Run) -> list[Question]:
    """Return the questions with a defined AUROC: errors first, then the groups in the order of the datasets.

    A group of several datasets is evaluated by the mean over them.
    """
    by_place: dict[Place, list[Metric]] = {}
    for metric in run.metrics:
        if metric.metric == "auroc" and number(metric.value) and metric.score in run.detectors:
            by_place.setdefault(place_of(run, metric), []).append(metric)
    members: dict[tuple[str, str], list[Place]] = {}
    for task_and_dataset in by_place:
        members.setdefault((task_and_dataset[0], task_and_dataset[2]), []).append(task_and_dataset)
    questions = []
    for members_of_group in members.values():
        datasets_of = dict.fromkeys(task_and_dataset[1] for task_and_dataset in members_of_group)
        has_mean = len(datasets_of) > 2 and None in datasets_of
        datasets_of.pop(None, None)
        for task_and_dataset in members_of_group:
            if (task_and_dataset[1] is None) == has_mean:
                datasets = tuple(map(str, datasets_of)) if has_mean else (task_and_dataset[1] or task_and_dataset[2],)
                questions.append(_question(run, task_and_dataset, datasets, by_place[task_and_dataset]))
    return sorted(questions, key=lambda question: _position(run, question))


def _question(run: Run, place: Place, datasets: tuple[str, ...], metrics: list[Metric]) -> Question:
    ranked = sorted(metrics, key=lambda metric: -(metric.value or 0.0))
    baselines = tuple(score.name for score in run.scores if score.family == "baseline")
    by_score = {}
    for metric in ranked:
        by_score[metric.score] = metric
    return Question(place[0], place[2], place[1], datasets, by_score, baselines)


def _position(run: Run, question: Question) -> tuple[int, int]:
    task = TASK_ORDER.index(question.task) if question.task in TASK_ORDER else len(TASK_ORDER)
    roles = list(run.roles.values())
    return task, roles.index(question.group) if question.group in roles else len(roles)
