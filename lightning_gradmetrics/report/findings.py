"""What the figures say: the best of each family by column, and paired differences to a baseline with their verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_gradmetrics.report.columns import (
    SHOWN,
    Column,
    best_values,
    column_of,
    find_columns,
    ordered_scores,
    percent,
)
from lightning_gradmetrics.report.markup import Child, Markup, breakable, join, tag
from lightning_gradmetrics.report.run import Comparison, Metric, Run
from lightning_gradmetrics.report.tables import html_row, html_table, interval

__all__ = ["best_by_column", "comparison_table"]


def best_by_column(run: Run) -> Markup | None:
    """The best baseline beside the best gradient score in each column; None where a family is missing."""
    family = {score.name: score.family == "baseline" for score in run.scores}
    rows = []
    for column, entries in find_columns(run).items():
        sides = [{name: e for name, e in entries.items() if family.get(name) is side} for side in (True, False)]
        best = [best_values(column, side) for side in sides]
        if all(best):
            values = [side[names[0]].value or 0.0 for side, names in zip(sides, best, strict=True)]
            rows.append([tag("th", breakable(column.title), scope="row"), *_best_cells(column, best, values)])
    head = ["Column", "Best baseline", "Best gradient score", "Gradient against baseline"]
    return html_table(html_row(head, "th"), map(html_row, rows), class_="data") if rows else None


def _best_cells(column: Column, best: list[list[str]], values: list[float]) -> list[Child]:
    digits = column.kind.digits
    baseline, gradient = (round(100 * value, digits) / 100 for value in values)  # so that it agrees with what is shown
    gain = (gradient - baseline) * (1 if column.kind.higher else -1)
    points = percent(abs(gain), digits)
    word = "equal" if float(points) == 0 else f"{points} {'better' if gain > 0 else 'worse'}"
    named = [f"{names[0]} {f'(+{len(names) - 1} equal) ' if len(names) > 1 else ''}" for names in best]
    figures = [tag("b", percent(value, digits)) for value in values]
    return [*(join(breakable(name), figure) for name, figure in zip(named, figures, strict=True)), word]


def shown_comparisons(run: Run) -> list[Comparison]:
    """The comparisons of the main table's metrics; where there are none of these, all."""
    main = [entry for entry in run.comparisons if entry.metric in SHOWN.get(entry.task, ())]
    return main or list(run.comparisons)


def comparison_table(run: Run) -> Markup | None:
    """Paired differences to a baseline, a row a score and a column a metric; None where the run has none."""
    columns: dict[Column, dict[str, list[Comparison]]] = {}
    for entry in shown_comparisons(run):
        column = column_of(run, Metric(entry.score, entry.task, entry.metric, None, entry.dataset, entry.group))
        columns.setdefault(column, {}).setdefault(entry.score, []).append(entry)
    names = [name for name in ordered_scores(run) if any(name in entries for entries in columns.values())]
    if not names:
        return None
    sole = {column: _sole_baseline(entries.values()) for column, entries in columns.items()}
    head = [tag("th", "Score", scope="col"), *(_comparison_head(column, sole[column]) for column in columns)]
    rows = [
        [
            tag("th", breakable(name), scope="row"),
            *(_comparison_cell(column, entries.get(name, ()), sole[column]) for column, entries in columns.items()),
        ]
        for name in names
    ]
    return html_table(html_row(head), map(html_row, rows), class_="data")


def _sole_baseline(entries: Iterable[Sequence[Comparison]]) -> str | None:
    names = {entry.baseline for part in entries for entry in part}
    return next(iter(names)) if len(names) == 1 else None


def _comparison_head(column: Column, baseline: str | None) -> Markup:
    task = {"ood": "out-of-distribution"}.get(column.task, column.task)
    where = tag("span", f"{task}, {'group ' if column.grouped else ''}{column.place}", class_="small")
    against = tag("span", f"against {baseline}", class_="small") if baseline else None
    return tag("th", f"{column.kind.title} {column.kind.arrow}", where, against, scope="col")


def _comparison_cell(column: Column, entries: Sequence[Comparison], sole: str | None) -> Markup:
    digits, parts = column.kind.digits, []
    for entry in entries:
        difference = percent(entry.difference, digits)
        signed = f"+{difference}" if (entry.difference or 0) > 0 else difference
        ends = "" if entry.low is None or entry.high is None else f" ({interval(entry.low, entry.high, digits)})"
        against = "" if sole else f" against {entry.baseline}"
        verdict = tag("span", entry.verdict, class_=f"verdict {entry.verdict.split(' ')[0]}")
        parts.append(join(verdict, tag("span", f"{signed}{ends}{against}", class_="small")))
    return tag("td", parts or "–")
