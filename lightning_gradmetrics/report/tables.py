"""The tables of the report: data sets, the main table, the most uncertain samples, and every figure of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from lightning_gradmetrics.report.columns import (
    ROLES,
    Column,
    best_values,
    column_of,
    find_columns,
    ordered_scores,
    percent,
)
from lightning_gradmetrics.report.markup import Child, Markup, breakable, join, tag
from lightning_gradmetrics.report.run import Metric, Rows, Run, Score

__all__ = [
    "all_figures",
    "counted",
    "data_table",
    "family_mark",
    "html_row",
    "html_table",
    "interval",
    "main_table",
    "sample_tables",
]

_SAMPLE_CELLS = 150


def html_table(head: Child, body: Iterable[Child], **attributes: str) -> Markup:
    """A table that scrolls sideways on its own where it is wider than the page."""
    return tag("div", tag("table", tag("thead", head), tag("tbody", body), **attributes), class_="scroll", tabindex=0)


def html_row(cells: Iterable[Child], element: str = "td") -> Markup:
    """A row; what is not a cell yet becomes one."""
    return tag(
        "tr", [cell if isinstance(cell, Markup) and cell.startswith("<t") else tag(element, cell) for cell in cells]
    )


def family_mark(score: Score) -> Markup:
    """A word that says what kind of score it is, in the kind's colour."""
    return tag(
        "span", score.family or "other", class_=f"mark {'baseline' if score.family == 'baseline' else 'gradient'}"
    )


def data_table(run: Run) -> Markup:
    """One row a data set: role, rows, non-finite rows, accuracy, description."""
    described = any(dataset.description for dataset in run.datasets)
    head = ["Data set", "Role", "Rows", "Non-finite", "Labels", "Accuracy (%)", *(["What it is"] if described else [])]
    rows = [
        [
            tag("th", breakable(dataset.name), scope="row"),
            tag("td", ROLES.get(dataset.role, dataset.role or "–"), class_="keep"),
            tag("td", _count(dataset.rows), class_="n"),
            tag("td", _count(dataset.not_finite), class_="n"),
            "yes" if dataset.labelled else "no",
            tag("td", percent(dataset.accuracy, 1), class_="n"),
            *([tag("td", dataset.description, class_="words")] if described else []),
        ]
        for dataset in run.datasets
    ]
    return html_table(html_row(head, "th"), map(html_row, rows), class_="data")


def counted(value: object, noun: str) -> str | None:
    """A number with its noun, as in '1 class' and '2 classes'; None where the value is no whole number."""
    if not isinstance(value, int):
        return None
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{_count(value)} {noun if value == 1 else plural}"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def main_table(run: Run) -> Markup:
    """A row a score, a column a metric and data set; best in bold; a click on a heading sorts."""
    columns = find_columns(run)
    scores = {score.name: score for score in run.scores}
    timed = any(score.seconds_per_sample is not None for score in run.scores)
    best = {
        column: set(best_values(column, entries) if len(entries) > 1 else ()) for column, entries in columns.items()
    }
    plain = not any(_has_interval(entry) for entries in columns.values() for entry in entries.values())
    body = [
        tag(
            "tr",
            tag("th", tag("span", breakable(name), class_="name"), _about(scores[name]), scope="row", data_sort=name),
            [_figure_cell(column, entries.get(name), name in best[column]) for column, entries in columns.items()],
            _time_cell(scores[name].seconds_per_sample) if timed else None,
            class_="baseline" if scores[name].family == "baseline" else "gradient",
        )
        for name in ordered_scores(run)
    ]
    return html_table(_main_head(columns, timed), body, class_="main plain sortable" if plain else "main sortable")


def _about(score: Score) -> Markup:
    words = {"all": "all parameters"}.get(score.target or "", score.target)
    target = tag("span", " ", words, class_="small") if words and score.family != "baseline" else None
    return tag("span", family_mark(score), target, class_="about")


def _main_head(columns: dict[Column, dict[str, Metric]], timed: bool) -> Markup:
    places: dict[tuple[str, str, bool], list[Column]] = {}
    for column in columns:
        places.setdefault((column.task, column.place, column.grouped), []).append(column)
    top = [tag("th", _sort_button("Score", None), rowspan=2, scope="col", class_="corner")]
    for (task, place, grouped), members in places.items():
        title = {"ood": "Out-of-distribution", "misclassification": "Misclassification"}.get(task, task)
        counts = tag("span", _counts(task, columns[members[0]].values()), class_="small")
        where = tag("span", "group " if grouped else None, breakable(place), class_="place")
        top.append(tag("th", title, where, counts, colspan=len(members), scope="colgroup", class_="first"))
    if timed:
        top.append(tag("th", "Cost", scope="colgroup", class_="first"))
    second = [
        tag(
            "th", _sort_button(f"{column.kind.title} {column.kind.arrow}", column.kind.higher), scope="col", class_=edge
        )
        for members in places.values()
        for column, edge in zip(members, ["first"] + [""] * len(members), strict=False)
    ]
    if timed:
        second.append(tag("th", _sort_button("ms / sample ↓", False), scope="col", class_="first"))
    return join(tag("tr", top), tag("tr", second))


def _sort_button(text: str, higher: bool | None) -> Markup:
    return tag("button", text, type="button", data_first="descending" if higher else "ascending")


def _counts(task: str, entries: Iterable[Metric]) -> str | None:
    counts = {(entry.count_positive, entry.count_negative) for entry in entries}
    if len(counts) != 1 or None in next(iter(counts)):
        return None
    positive, negative = next(iter(counts))
    words = ("wrong", "right") if task == "misclassification" else ("out", "in")
    return f"{_count(positive)} {words[0]}, {_count(negative)} {words[1]}"


def _figure_cell(column: Column, entry: Metric | None, best: bool) -> Markup:
    kind = column.kind
    value = None if entry is None else entry.value
    number = value is not None and math.isfinite(value)
    text: Child = percent(value, kind.digits)
    between = (
        tag("span", interval(entry.low, entry.high, kind.digits), class_="small")
        if entry and _has_interval(entry)
        else None
    )
    shown = tag("b", text) if best else text
    edge = "n first" if column.metric == "auroc" else "n"
    return tag("td", shown, between, class_=f"{edge} best" if best else edge, data_sort=value if number else "")


def _has_interval(entry: Metric) -> bool:
    return all(end is not None and math.isfinite(end) for end in (entry.low, entry.high))


def interval(low: float | None, high: float | None, digits: int) -> str:
    """Both ends times 100, as in '88.1 to 92.3'."""
    return f"{percent(low, digits)} to {percent(high, digits)}"


def _time_cell(seconds: float | None) -> Markup:
    if seconds is None or not math.isfinite(seconds):
        return tag("td", "–", class_="n first", data_sort="")
    return tag("td", f"{1000 * seconds:.2g}", class_="n first", data_sort=seconds)


def sample_tables(run: Run, names: list[str], count: int = 5) -> Markup | None:
    """For each score, folded but for the first, the most uncertain rows of each set; None where nothing is finite."""
    rows = {name: rows for name, rows in run.rows.items() if rows.finite.any()}
    if not rows:
        return None
    folds = [
        tag(
            "details",
            tag("summary", score),
            tag("div", [_sample_table(name, part, score, count) for name, part in rows.items()], class_="samples"),
            open=place == 0,
        )
        for place, score in enumerate(names[: max(1, _SAMPLE_CELLS // len(rows))])
    ]
    rest = (
        tag("details", tag("summary", f"The other {len(folds) - 1} scores"), folds[1:]) if len(folds) > 2 else folds[1:]
    )
    return join(folds[:1], rest)


def _sample_table(dataset: str, rows: Rows, score: str, count: int) -> Markup:
    values = rows.scores[score]
    usable = np.flatnonzero(rows.finite & np.isfinite(values))
    top = usable[np.argsort(-values[usable], kind="stable")[:count]]
    part, labelled = rows.take(top), bool(rows.labelled.any())
    head = ["Index", "Prediction", *(["Label"] if labelled else []), "Score"]
    cells: Callable[[int], list[Child]] = lambda i: [  # noqa: E731
        tag("td", int(part.index[i]), class_="n"),
        tag("td", int(part.prediction[i]) if part.prediction[i] >= 0 else "–", class_="n"),
        *([tag("td", int(part.label[i]) if part.labelled[i] else "–", class_="n")] if labelled else []),
        tag("td", f"{part.scores[score][i]:.4g}".replace("-", "\N{MINUS SIGN}"), class_="n"),
    ]
    table = html_table(html_row(head, "th"), [html_row(cells(i)) for i in range(len(top))], class_="data")
    return tag("div", tag("h4", dataset), table)


def all_figures(run: Run) -> Markup:
    """Every figure of the run, times 100 with two decimals, with interval and counts."""
    head = ["Score", "Figure", "Value", "Interval", "Positives", "Negatives"]
    rows = []
    for entry in run.metrics:
        column = column_of(run, entry)
        between = interval(entry.low, entry.high, 2) if _has_interval(entry) else "–"
        numbers = (percent(entry.value, 2), between, _count(entry.count_positive), _count(entry.count_negative))
        rows.append(
            [
                tag("th", breakable(entry.score), scope="row"),
                column.title,
                *(tag("td", text, class_="n") for text in numbers),
            ]
        )
    return html_table(html_row(head, "th"), map(html_row, rows), class_="data")
