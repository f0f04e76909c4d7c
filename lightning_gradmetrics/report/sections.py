"""The sections of the report: each a table or pictures with a plain sentence on how to read them, or None."""

from __future__ import annotations

from base64 import b64encode
from collections import Counter
from pathlib import Path

from lightning_gradmetrics.report.columns import find_columns, ordered_scores
from lightning_gradmetrics.report.drawing import Drawing
from lightning_gradmetrics.report.figures import (
    MAX_PANELS,
    correlation_figure,
    distribution_figures,
    risk_figures,
    roc_figures,
)
from lightning_gradmetrics.report.findings import best_by_column, comparison_table, shown_comparisons
from lightning_gradmetrics.report.markup import Markup, join, tag, void
from lightning_gradmetrics.report.run import IMAGE_TYPES, METRICS_FILE, RESULTS_FILE, Picture, Run
from lightning_gradmetrics.report.tables import counted, main_table, sample_tables

__all__ = [
    "agreement",
    "distributions",
    "findings",
    "most_uncertain",
    "notes",
    "out_of_distribution",
    "pictures",
    "scores",
    "wrong_predictions",
]

_TASKS = {
    "misclassification": "Misclassification: do wrong predictions (the positives) score higher than right ones?",
    "ood": "Out-of-distribution: do samples of the other set (the positives) score higher than in-distribution ones?",
}
_BETTER = {True: "higher is better", False: "lower is better", None: "direction not known"}


def scores(run: Run) -> Markup:
    """The main table and what its headings mean."""
    columns = find_columns(run)
    if not columns:
        return tag("p", "No figure could be computed in this run; the notes say why.")
    intervals = any(entry.low is not None and entry.high is not None for entry in run.metrics)
    reading = (
        "All figures are times 100; ↑ higher is better, ↓ lower is better. "
        f"{'The best of each column is bold. ' if len(run.scores) > 1 else ''}"
        f"{'The small line under a figure is its interval. ' if intervals else ''}Click a heading to sort."
    )
    tasks = [_TASKS[task] for task in dict.fromkeys(column.task for column in columns) if task in _TASKS]
    kinds = {column.metric: column.kind for column in columns}.values()
    if any(column.grouped for column in columns):
        tasks.append("A group's figure is the mean over its data sets.")
    words = [
        join(tag("b", kind.title), f" ({_BETTER[kind.higher]}){': ' if kind.meaning else ''}{kind.meaning}.")
        for kind in kinds
    ]
    return join(
        tag("p", reading), main_table(run), tag("ul", [tag("li", text) for text in [*tasks, *words]], class_="small")
    )


def findings(run: Run) -> Markup | None:
    """The run's statements, the best of each family, and the paired differences."""
    best, compared = best_by_column(run), comparison_table(run)
    warning = (
        "The run holds no intervals on these differences: on a few hundred samples, a few points can be chance."
        if best and not compared
        else None
    )
    verdicts = Counter(entry.verdict for entry in shown_comparisons(run))
    told = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    reading = f"Score minus baseline on the same rows, times 100, with its interval. In all: {told}."
    parts = [
        tag("ul", [tag("li", sentence) for sentence in run.statements]) if run.statements else None,
        best,
        warning and tag("p", warning),
        compared and join(tag("h3", "Paired differences to a baseline"), tag("p", reading), compared),
    ]
    return join(parts) if any(parts) else None


def notes(run: Run, drawing: Drawing) -> Markup | None:
    """The run's own notes, and what they do not say of what is missing here and why."""
    lines = [*run.notes, *_gaps(run), *_drawing_notes(run, drawing)]
    return tag("ul", [tag("li", line) for line in dict.fromkeys(lines)]) if lines else None


def _gaps(run: Run) -> list[str]:
    """What the tables lack, unless the run's notes have the subject's word already."""
    parts = "; ".join(f"{d.name}: {d.not_finite} of {d.rows}" for d in run.datasets if d.not_finite)
    rate = run.settings.get("rate", 0.95)
    told = {
        "finite": f"Rows with NaN or Inf in the input, the logits or a score ({parts}) stay in {RESULTS_FILE}, marked "
        "finite = false, and enter no figure and no plot."
        if parts
        else "",
        "label": ""
        if any(dataset.role == "id" and dataset.labelled for dataset in run.datasets)
        else "No in-distribution data set has labels, so misclassification is not judged.",
        "out-of-distribution": ""
        if any(dataset.role not in ("", "id") for dataset in run.datasets)
        else "There is no out-of-distribution data set, so only misclassification can be judged.",
        "FPR95": "" if rate == 0.95 else f"FPR95 is taken at a true-positive rate of {100 * rate:g} % in this run.",
    }
    return [text for word, text in told.items() if text and not any(word in note for note in run.notes)]


def _drawing_notes(run: Run, drawing: Drawing) -> list[str]:
    strangers = sorted(set(run.rows) - {dataset.name for dataset in run.datasets})
    drawn = counted(sum(len(rows) for rows in drawing.rows.values()), "row")
    told = {
        "No row is finite, so nothing is drawn.": not drawing.rows,
        f"Plots show {drawn}, chosen at random with a fixed seed; tables use all.": drawing.sampled,
        f"Plots show at most {MAX_PANELS} data sets.": len(drawing.rows) > MAX_PANELS,
        f"{RESULTS_FILE} also holds rows of {', '.join(strangers)}, which {METRICS_FILE} does not describe.": strangers,
    }
    return [sentence for sentence, holds in told.items() if holds]


def distributions(drawing: Drawing) -> Markup | None:
    """A panel a score."""
    reading = (
        "How each score spreads over each kind of sample: the further right a row lies of the first one, the better "
        "the score tells that kind apart. Each histogram is scaled to its own highest bin; the upright line is the "
        "median; values beyond the axis are counted in its end bins; the axis is logarithmic where values span decades."
    )
    figures = distribution_figures(drawing)
    return figures and join(tag("p", reading), figures)


def out_of_distribution(drawing: Drawing) -> Markup | None:
    """ROC curves, a panel for each out-of-distribution set."""
    reading = (
        "ROC curves: the share of the other set that is flagged (up) at the price of flagging in-distribution samples "
        f"(right). Nearer to the top left corner is better; the dotted diagonal is guessing. {_curve_reading(drawing)}"
    )
    figures = roc_figures(drawing)
    return figures and join(tag("p", reading), figures)


def _curve_reading(drawing: Drawing) -> str:
    families = {score.family == "baseline" for score in drawing.run.scores}
    parts = {
        "Solid lines are gradient scores, dashed ones baselines.": len(families) > 1,
        "The leading scores are in colour, the others grey.": len(drawing.run.scores) > len(drawing.colours),
        "Point at or tap a name in the legend to bring out its curve.": len(drawing.run.scores) > 1,
    }
    return " ".join(text for text, holds in parts.items() if holds)


def wrong_predictions(drawing: Drawing) -> Markup | None:
    """Risk-coverage curves, a panel for each labelled in-distribution set."""
    reading = (
        "Risk-coverage curves: the error rate among the samples that are kept when only the least uncertain are kept; "
        "lower is better. Dotted: keeping all (level), and a perfect ordering (the lowest possible). "
        f"{_curve_reading(drawing)}"
    )
    figures = risk_figures(drawing)
    return figures and join(tag("p", reading), figures)


def agreement(drawing: Drawing) -> Markup | None:
    """The correlation heat map."""
    over = "in-distribution rows" if drawing.inside else "rows of all data sets"
    reading = (
        f"Spearman rank correlation of each pair of scores over the {over}, times 100: 100 (dark red) means that both "
        "put the samples in the same order, 0 (white) that the orders are unrelated, −100 (dark blue) that one is the "
        "reverse of the other."
    )
    figure = correlation_figure(drawing)
    return figure and join(tag("p", reading), figure)


def most_uncertain(run: Run, drawing: Drawing) -> Markup | None:
    """The rows with the highest scores; the leading scores come first."""
    names = list(dict.fromkeys([*drawing.colours, *ordered_scores(run)]))
    reading = (
        f"The samples with the highest score in each data set, by their index in {RESULTS_FILE}: worth a look by eye."
    )
    tables = sample_tables(run, names)
    return tables and join(tag("p", reading), tables)


def pictures(run: Run) -> dict[str, Markup]:
    """The pictures that the run wrote, inside the page, by the titles of their sections."""
    sections: dict[str, list[Markup]] = {}
    for picture in run.pictures:
        sections.setdefault(picture.section, []).append(_picture(run.directory, picture))
    return {title: join(parts) for title, parts in sections.items()}


def _picture(directory: Path, picture: Picture) -> Markup:
    path = directory / picture.file
    source = f"data:{IMAGE_TYPES[path.suffix]};base64,{b64encode(path.read_bytes()).decode()}"
    words = tag("figcaption", tag("b", picture.title), tag("span", picture.caption, class_="small"))
    return tag("figure", words, void("img", src=source, alt=picture.title), class_="picture")
