"""The page: sections in the order in which a reader wants them; a section with nothing to say is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from lightning_gradmetrics.report.columns import find_columns, ordered_scores
from lightning_gradmetrics.report.figures import (
    MAX_ROWS,
    Drawing,
    correlation_figure,
    distribution_figures,
    risk_figures,
    roc_figures,
    start_drawing,
)
from lightning_gradmetrics.report.markup import Child, Markup, join, tag
from lightning_gradmetrics.report.run import METRICS_FILE, RESULTS_FILE, Run
from lightning_gradmetrics.report.style import CSS, SCRIPT
from lightning_gradmetrics.report.tables import (
    all_figures,
    best_by_column,
    comparison_table,
    data_table,
    main_table,
    sample_tables,
)

__all__ = ["render"]


def render(run: Run) -> str:
    """The whole report as one HTML document."""
    drawing = start_drawing(run)
    sections = {
        "Scores": _scores(run),
        "What the figures say": _findings(run),
        "Notes": _notes(run, drawing),
        "Distributions": _distributions(drawing),
        "Finding out-of-distribution samples": _roc(drawing),
        "Finding wrong predictions": _risk(drawing),
        "Which scores agree": _correlation(drawing),
        "Most uncertain samples": _samples(run, drawing),
        "Run details": _details(run),
    }
    shown = {title: content for title, content in sections.items() if content}
    anchors = {title: title.lower().replace(" ", "-") for title in shown}
    title = f"Gradient uncertainty report: {run.model.get('name') or 'unnamed model'}"
    head = join(
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'),
        tag("title", title),
        tag("style", Markup(CSS)),
    )
    body = join(
        tag("header", tag("h1", title), _introduction(run)),
        tag("nav", [tag("a", title, href=f"#{anchors[title]}") for title in shown], aria_label="Sections"),
        tag("main", [tag("section", tag("h2", title), content, id=anchors[title]) for title, content in shown.items()]),
        tag("script", Markup(SCRIPT)),
    )
    return f"<!DOCTYPE html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"


def _introduction(run: Run) -> Markup:
    facts = [
        _counted(run.model.get("parameters"), "parameter"),
        _counted(run.model.get("classes"), "class"),
        f"checkpoint {PurePath(str(run.model['checkpoint'])).name}" if run.model.get("checkpoint") else None,
    ]
    known = ", ".join(fact for fact in facts if fact)
    rows = sum(len(rows) for rows in run.rows.values())
    families = Counter("baseline" if score.family == "baseline" else "gradient" for score in run.scores)
    judged = " and ".join(
        _counted(families[family], noun) or ""
        for family, noun in (("gradient", "gradient score"), ("baseline", "baseline"))
        if families[family]
    )
    return join(
        tag(
            "p",
            tag("b", str(run.model.get("name") or "The model")),
            f" ({known})" if known else "",
            f" was run on {_counted(rows, 'sample')} of {_counted(len(run.rows), 'data set')}, and each sample was given "
            f"{judged or 'no score'}. A score is an uncertainty: higher means less certain.",
            f" Made {run.created}." if run.created else "",
        ),
        data_table(run) if run.datasets else None,
    )


def _counted(value: Any, noun: str) -> str | None:
    if not isinstance(value, int):
        return None
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{value:,} {noun if value == 1 else plural}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _scores(run: Run) -> Markup:
    columns = find_columns(run)
    if not columns:
        return (
            join(tag("p", "No figure could be computed in this run; the notes say why."))
            if run.scores
            else join(tag("p", "No scores."))
        )
    kinds = {column.metric: column.kind for column in columns}
    better = {True: "higher is better", False: "lower is better", None: "direction not known"}
    asks = {
        "misprediction": "Misprediction: do wrong predictions (positives) score higher than right ones?",
        "ood": "Out-of-distribution: do samples of the other set (positives) score higher than in-distribution ones?",
    }
    tasks = dict.fromkeys(column.task for column in columns)
    return join(
        tag(
            "p",
            "All figures are times 100; ↑ higher is better, ↓ lower is better. The best of each column is bold. Click a heading to sort.",
        ),
        main_table(run),
        tag("ul", [tag("li", asks[task]) for task in tasks if task in asks], class_="small"),
        tag(
            "ul",
            [
                tag("li", tag("b", kind.title), f" ({better[kind.higher]}): {kind.meaning}." if kind.meaning else ".")
                for kind in kinds.values()
            ],
            class_="small",
        ),
        tag("p", "The small line under a figure is its interval.", class_="small") if any(_interval(run)) else None,
    )


def _interval(run: Run) -> Iterable[bool]:
    return (entry.low is not None and entry.high is not None for entry in run.metrics)


def _findings(run: Run) -> Markup | None:
    best, compared = best_by_column(run), comparison_table(run)
    verdicts = Counter(entry.verdict for entry in run.comparisons)
    told = ", ".join(f"{verdict}: {count}" for verdict, count in verdicts.items())
    parts = [
        tag("ul", [tag("li", sentence) for sentence in run.statements]) if run.statements else None,
        best,
        None
        if compared or best is None
        else tag(
            "p",
            "The run holds no intervals on these differences: on a few hundred samples, a difference of a few points can be chance.",
            class_="small",
        ),
        compared and tag("h3", "Paired differences to the best baseline"),
        compared
        and tag("p", f"Score minus baseline on the same rows, times 100, with its interval. Verdicts: {told}."),
        compared,
    ]
    return join(parts) if any(parts) else None


def _notes(run: Run, drawing: Drawing) -> Markup | None:
    notes = [*run.notes]
    for dataset in run.datasets:
        if dataset.not_finite:
            notes.append(
                f"{dataset.name}: {_counted(dataset.not_finite, 'row')} of {dataset.rows} had NaN or Inf in the input, the logits or a score. "
                f"They are kept in {RESULTS_FILE} with finite = false and enter no figure and no plot."
            )
    if run.datasets and not any(dataset.role == "id" and dataset.labelled for dataset in run.datasets):
        notes.append("No in-distribution data set has labels, so misprediction is not judged.")
    if not any(dataset.role not in ("", "id") for dataset in run.datasets):
        notes.append("The run has no out-of-distribution data set, so out-of-distribution detection is not judged.")
    if not drawing.rows:
        notes.append("No row is finite, so nothing is drawn.")
    if drawing.sampled:
        notes.append(
            f"Plots show a random part of the rows (fixed seed, about {MAX_ROWS} in all). All figures in tables use every finite row."
        )
    strangers = sorted(set(run.rows) - {dataset.name for dataset in run.datasets})
    if strangers:
        notes.append(
            f"{RESULTS_FILE} also holds rows of {', '.join(strangers)}, which {METRICS_FILE} does not describe; they are not shown."
        )
    return tag("ul", [tag("li", note) for note in dict.fromkeys(notes)]) if notes else None


def _distributions(drawing: Drawing) -> Markup | None:
    figures = distribution_figures(drawing)
    return figures and join(
        tag(
            "p",
            "How each score spreads over each kind of sample: the further a row lies to the right of the first one, the better the "
            "score tells that kind apart. Each histogram is scaled to its own highest bin; the upright tick is the median; values beyond the axis "
            "are counted in its end bins; the axis is logarithmic where the values span decades.",
        ),
        figures,
    )


_READING = (
    "Solid: gradient scores; dashed: baselines. The leading scores are in colour, the others grey; "
    "point at or tap a name in the legend to bring out its curve."
)


def _roc(drawing: Drawing) -> Markup | None:
    figures = roc_figures(drawing)
    return figures and join(
        tag(
            "p",
            "ROC curves: how many samples of the other set are flagged (up) at the price of flagging in-distribution ones (right); "
            "nearer to the top left corner is better, the dotted diagonal is guessing. ",
            _READING,
        ),
        figures,
    )


def _risk(drawing: Drawing) -> Markup | None:
    figures = risk_figures(drawing)
    return figures and join(
        tag(
            "p",
            "Risk-coverage curves: the error rate among the samples kept when only the least uncertain are kept; lower is better. "
            "Dotted: all rows (level), and a perfect ordering (the lowest possible). ",
            _READING,
        ),
        figures,
    )


def _correlation(drawing: Drawing) -> Markup | None:
    figure = correlation_figure(drawing)
    over = "in-distribution rows" if drawing.inside else "all rows"
    return figure and join(
        tag(
            "p",
            f"Spearman rank correlation of each pair of scores over {over}, times 100: 100 means that both put the samples in the same "
            "order, 0 that the orders are unrelated, −100 that one is the reverse of the other.",
        ),
        figure,
    )


def _samples(run: Run, drawing: Drawing) -> Markup | None:
    names = list(dict.fromkeys([*drawing.colours, *ordered_scores(run)]))
    tables = sample_tables(run, names)
    return tables and join(
        tag(
            "p",
            f"The samples with the highest score in each data set, by their row index in {RESULTS_FILE}; worth a look by eye.",
        ),
        tables,
    )


def _details(run: Run) -> Markup:
    files = {
        "Directory": run.directory.name or str(run.directory),
        "Per-sample results": RESULTS_FILE,
        "Figures": METRICS_FILE,
    }
    summaries = {
        score.name: " · ".join(
            part for part in (score.summary, score.paper, score.target and f"of {score.target}") if part
        )
        for score in run.scores
    }
    parts: list[Child] = [
        _fold("All figures", all_figures(run)) if run.metrics else None,
        _fold("Scores in words", _pairs(summaries)) if any(summaries.values()) else None,
        _fold("Command", tag("pre", run.command)) if run.command else None,
        _fold("Model", _pairs(run.model)) if run.model else None,
        _fold("Environment", _pairs(run.environment)) if run.environment else None,
        _fold("Timing (seconds where not named otherwise)", _pairs(run.timing)) if run.timing else None,
        _fold("Files", _pairs(files)),
    ]
    return join(parts)


def _fold(title: str, content: Markup) -> Markup:
    printed = title not in ("All figures", "Scores in words")
    return tag("details", tag("summary", title), content, class_="print" if printed else None)


def _pairs(values: Mapping[str, Any]) -> Markup:
    return tag("dl", [[tag("dt", key), tag("dd", _plain(value))] for key, value in values.items()])


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)
