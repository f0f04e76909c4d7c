"""The panels of curves and distributions: a picture, a caption and a legend for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from lightning_gradmetrics.report.curves import (
    Points,
    mean_roc,
    risk_coverage,
    roc_of_errors,
    roc_of_errors_and_set,
    roc_of_sets,
)
from lightning_gradmetrics.report.plots import PANEL_SIZE, Line, curves_svg, histogram_svg, line_styles
from lightning_gradmetrics.report.questions import REFERENCE, Question
from lightning_gradmetrics.report.run import Floats, Metric, Rows, Run
from lightning_gradmetrics.report.wording import percent, whole

__all__ = ["Panel", "distribution_panels", "risk_panels", "roc_panel", "roc_panels"]

CHANCE = Line("chance", np.array([0.0, 1.0]), np.array([0.0, 1.0]))
ROC_LABELS = {
    "misclassification": ("correct", "incorrect"),
    "ood": ("in-distribution", "{group}"),
    "joint": ("correct", "incorrect or {group}"),
}
"""Names of the negatives and the positives of each task, for the axes of curves."""

MAX_ROWS = 50_000
"""Approximate limit of rows in plots, divided evenly among the datasets."""


@dataclass(frozen=True)
class LegendLine:
    """A line of a legend: the curve's name, its number, its CSS colour and its dashes."""

    name: str
    value: str
    colour: str
    dashes: str = ""


@dataclass(frozen=True)
class Panel:
    """A picture with its title and its legend; ``others`` is the number of grey curves."""

    title: str
    picture: Markup
    legend: tuple[LegendLine, ...]
    others: int = 0
    score: str = ""


def drawn_rows(run: Run) -> dict[str, Rows]:
    """Return the finite rows to draw: all, or a fixed random subset of a large dataset."""
    finite = run.finite_rows()
    share = max(200, MAX_ROWS // max(1, len(finite)))
    random = np.random.default_rng(0)
    drawn = {}
    for name, rows in finite.items():
        if len(rows) > share:
            rows = rows.take(np.sort(random.choice(len(rows), share, replace=False)))
        drawn[name] = rows
    return drawn


def _lines(points: dict[str, Points], leaders: Sequence[str]) -> list[Line]:
    """Return the curves, with the leaders highlighted and max softmax always in the first style."""
    order = leaders if REFERENCE in leaders else ["", *leaders]
    lines = []
    for name, (x, y) in points.items():
        lines.append(Line(name, x, y, list(order).index(name) if name in order else None))
    return lines


def _panel(title: str, picture: Markup, metrics: dict[str, Metric], leaders: Sequence[str], count: int) -> Panel:
    order = leaders if REFERENCE in leaders else ["", *leaders]
    styles = line_styles(order)
    digits = 2 if next(iter(metrics.values())).metric == "aurc" else 1
    legend = []
    for name in leaders:
        legend.append(LegendLine(name, percent(metrics[name].value, digits), *styles[name]))
    return Panel(title, picture, tuple(legend), count - len(leaders))


def _roc_points(run: Run, question: Question, rows: dict[str, Rows]) -> dict[str, Points]:
    inside = list(run.split_by_role(rows)[0].values())
    share = run.settings.get("ood_share", 0.5)
    points = {}
    for name in question.metrics:
        curves = []
        for dataset in question.datasets:
            if dataset not in rows:
                continue
            if question.task == "misclassification":
                curve = roc_of_errors(rows[dataset], name)
            elif question.task == "joint":
                curve = roc_of_errors_and_set(inside, rows[dataset], name, share)
            else:
                curve = roc_of_sets(inside, rows[dataset], name)
            curves += [curve] if curve else []
        if curves:
            points[name] = mean_roc(curves)
    return points


def roc_panel(run: Run, question: Question, key: str, size: tuple[float, float] = PANEL_SIZE) -> Panel | None:
    """Return the ROC curves of a question; None if nothing can be drawn."""
    if question.task not in ROC_LABELS:
        return None
    points = _roc_points(run, question, drawn_rows(run))
    leaders = [name for name in question.leaders() if name in points]
    if not leaders:
        return None
    negatives, positives = ROC_LABELS[question.task]
    picture = curves_svg(
        _lines(points, leaders),
        labels=(f"{negatives} flagged (%)", f"{positives.format(group=question.group)} flagged (%)"),
        top=1.01,
        dotted=[CHANCE],
        title=f"ROC curves of {len(points)} scores on {', '.join(question.datasets)}. The legend lists the areas.",
        key=key,
        size=size,
    )
    title = f"ROC, {', '.join(question.datasets)}"
    return _panel(title, picture, dict(question.metrics), leaders, len(points))


def roc_panels(run: Run, questions: Sequence[Question]) -> list[Panel]:
    """Return the ROC curves of each dataset of the questions that average over several."""
    panels: list[Panel] = []
    for question in questions:
        if question.dataset is None and len(question.datasets) > 1:
            for dataset in question.datasets:
                metrics = _metrics_of(run, question.task, dataset, "auroc")
                if metrics:
                    single = Question(question.task, question.group, dataset, (dataset,), metrics, question.baselines)
                    panel = roc_panel(run, single, f"roc{len(panels)}")
                    panels += [panel] if panel else []
    return panels


def _metrics_of(run: Run, task: str, dataset: str, metric: str) -> dict[str, Metric]:
    """Return a metric of each detector on a dataset, best first."""
    metrics = []
    for entry in run.metrics:
        wanted = (entry.task, entry.dataset, entry.metric) == (task, dataset, metric) and entry.value is not None
        if wanted and entry.score in run.detectors:
            metrics.append(entry)
    sign = -1 if metric == "auroc" else 1
    best_first = sorted(metrics, key=lambda entry: sign * (entry.value or 0.0))
    return {entry.score: entry for entry in best_first}


def risk_panels(run: Run) -> list[Panel]:
    """Return the risk-coverage curves of each in-distribution dataset with correct and incorrect predictions."""
    panels: list[Panel] = []
    for name, rows in drawn_rows(run).items():
        metrics = _metrics_of(run, "misclassification", name, "aurc")
        if run.role_of(name) == "id" and metrics and 0 < rows.incorrect.sum() < rows.labelled.sum():
            panels.append(_risk_panel(name, rows, metrics, f"risk{len(panels)}"))
    return panels


def _risk_panel(dataset: str, rows: Rows, metrics: dict[str, Metric], key: str) -> Panel:
    points = {}
    for name in metrics:
        curve = risk_coverage(rows, name)
        if curve:
            points[name] = curve
    leaders = list(points)[:4]
    if REFERENCE in points:
        leaders = list(dict.fromkeys([REFERENCE, *points]))[:4]
    elif len(leaders) > 3:
        leaders.pop()
    rate = float(rows.incorrect[rows.labelled].mean())
    level = Line("all samples", np.array([0.0, 1.0]), np.array([rate, rate]))
    picture = curves_svg(
        _lines(points, leaders),
        labels=("samples retained (%)", "errors among them (%)"),
        top=1.3 * rate,
        dotted=[level],
        title=f"Error rate over coverage on {dataset}, {len(points)} scores; all samples: {percent(rate)} %.",
        key=key,
    )
    return _panel(f"{dataset}: {percent(rate)} % errors without rejection", picture, metrics, leaders, len(points))


def groups_of(run: Run, rows: dict[str, Rows], score: str) -> dict[str, Floats]:
    """Return the finite values of a score: correct and incorrect predictions, then each other dataset."""
    groups = {}
    labelled = [name for name, columns in run.split_by_role(rows)[0].items() if columns.labelled.any()]
    for name, columns in rows.items():
        values = columns.scores[score]
        if name in labelled:
            prefix = f"{name} " if len(labelled) > 1 else ""
            groups[f"{prefix}correct"] = values[columns.labelled & ~columns.incorrect]
            groups[f"{prefix}incorrect"] = values[columns.incorrect]
        else:
            groups[name] = values
    finite = {}
    for name, values in groups.items():
        if np.isfinite(values).any():
            finite[name] = values[np.isfinite(values)]
    return finite


def distribution_panels(run: Run, names: Sequence[str]) -> list[Panel]:
    """Return the distribution of each score for each kind of sample."""
    rows = drawn_rows(run)
    panels: list[Panel] = []
    for number, name in enumerate(names):
        groups = groups_of(run, rows, name)
        if groups:
            medians = [f"{group} {np.median(values):.3g}" for group, values in groups.items()]
            title = f"Distribution of {name}. Medians: {', '.join(medians)}."
            picture = histogram_svg(groups, title=title, key=f"hist{number}")
            legend = []
            for position, (group, values) in enumerate(groups.items(), 1):
                legend.append(LegendLine(group, whole(len(values)), f"var(--s{(position - 1) % 6 + 1})"))
            panels.append(Panel(name, picture, tuple(legend), score=name))
    return panels
