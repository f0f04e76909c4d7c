"""The pictures of the report with their captions and legends, and alternative text for those who cannot see them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from lightning_gradmetrics.report.columns import Column, find_columns, ordered_scores, percent
from lightning_gradmetrics.report.curves import Floats, risk_coverage_curve, roc_curve, spearman
from lightning_gradmetrics.report.drawing import Drawing, known_value
from lightning_gradmetrics.report.markup import Markup, breakable, prose, tag
from lightning_gradmetrics.report.plots import Curve, Group, curves_svg, distribution_svg, heat_map_svg
from lightning_gradmetrics.report.run import Rows
from lightning_gradmetrics.report.svg import FAINT, SERIES, colour_variable
from lightning_gradmetrics.report.tables import family_mark

__all__ = ["MAX_PANELS", "correlation_figure", "distribution_figures", "risk_figures", "roc_figures"]

MAX_PANELS = 12
"""At most this many data sets are drawn in a section."""


def distribution_figures(drawing: Drawing) -> Markup | None:
    """A panel a score: right, wrong, and each other set over one axis; None where nothing is finite."""
    if not drawing.rows:
        return None
    panels = []
    scores = {score.name: score for score in drawing.run.scores}
    for number, name in enumerate(ordered_scores(drawing.run)):
        groups = _groups(drawing, name)
        medians = [f"{group.name} {np.median(group.values):.3g}" for group in groups if len(group.values)]
        picture = distribution_svg(
            groups, f"Distribution of {name}. Medians: {', '.join(medians) or 'none'}.", f"d{number}"
        )
        heading = [tag("b", breakable(name)), " ", family_mark(scores[name])]
        caption = tag("figcaption", heading, _summary(scores[name].summary))
        panels.append(tag("figure", caption, picture))
    return tag("div", panels, class_="panels")


def _summary(text: str) -> Markup | None:
    return tag("span", prose(text), class_="small") if text else None


def _groups(drawing: Drawing, score: str) -> list[Group]:
    """In-distribution rows split into right and wrong where labels allow, then the other sets, up to ``MAX_PANELS``."""
    parts: list[tuple[str, Floats]] = []
    for dataset in drawing.run.datasets:
        rows = drawing.rows.get(dataset.name)
        if rows is None:
            continue
        values = rows.scores[score]
        if dataset.role == "id" and rows.labelled.any():
            prefix = f"{dataset.name} " if len(drawing.inside) > 1 else ""
            parts += [(f"{prefix}right", values[rows.labelled & ~rows.wrong]), (f"{prefix}wrong", values[rows.wrong])]
        else:
            parts.append((dataset.name, values))
    return [
        Group(name, SERIES[place % len(SERIES)], values[np.isfinite(values)])
        for place, (name, values) in enumerate(parts[:MAX_PANELS])
    ]


def roc_figures(drawing: Drawing) -> Markup | None:
    """A panel for each out-of-distribution set that the run judged; None where there is none."""
    columns = {column: entries for column, entries in find_columns(drawing.run).items() if column.task == "ood"}
    sets = [
        d.name
        for d in drawing.run.datasets
        if d.name in {c.place for c in columns if not c.grouped} and d.name in drawing.rows
    ]
    if not sets or not drawing.inside:
        return None
    chance = Curve("chance", -1, np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    panels = []
    for number, place in enumerate(sets[:MAX_PANELS]):
        points = {}
        for name in ordered_scores(drawing.run):
            negative, positive = drawing.values(drawing.inside, name), drawing.values([place], name)
            if len(negative) and len(positive):
                points[name] = roc_curve(negative, positive)
        label = f"ROC curves of {len(points)} scores, {place} against in-distribution. The legend lists the areas."
        axes = ("in-distribution rows flagged (%)", f"{place} rows flagged (%)")
        curves = _curves(drawing, points)
        picture = curves_svg(curves, [chance], axes, 1.02, label, f"r{number}")
        panels.append(_with_legend(drawing, place, picture, curves, Column("ood", place, "auroc")))
    return tag("div", panels, class_="panels wide")


def risk_figures(drawing: Drawing) -> Markup | None:
    """A panel for each in-distribution set with right and wrong predictions; None where there is none."""
    panels = []
    for number, place in enumerate(drawing.inside[:MAX_PANELS]):
        rows = drawing.rows[place].take(drawing.rows[place].labelled)
        if not 0 < rows.wrong.sum() < len(rows):
            continue
        points = {
            name: _risk(rows, name) for name in ordered_scores(drawing.run) if np.isfinite(rows.scores[name]).any()
        }
        rate = float(rows.wrong.mean())
        perfect = Curve("perfect", -1, *risk_coverage_curve(rows.wrong.astype(np.float64), rows.wrong))
        level = Curve("all rows", -1, np.array([0.0, 1.0]), np.array([rate, rate]))
        top = 1.15 * max([rate, *(float(y[x >= 0.05].max(initial=0.0)) for x, y in points.values())])
        label = f"Error rate over the share of {place} rows kept, {len(points)} scores; all rows: {percent(rate, 1)} %."
        curves = _curves(drawing, points)
        picture = curves_svg(
            curves, [perfect, level], ("rows kept (%)", "error rate among them (%)"), top, label, f"k{number}"
        )
        panels.append(_with_legend(drawing, place, picture, curves, Column("misclassification", place, "aurc")))
    return tag("div", panels, class_="panels wide") if panels else None


def _risk(rows: Rows, score: str) -> tuple[Floats, Floats]:
    known = np.isfinite(rows.scores[score])
    return risk_coverage_curve(rows.scores[score][known], rows.wrong[known])


def _curves(drawing: Drawing, points: Mapping[str, tuple[Floats, Floats]]) -> list[Curve]:
    baseline = {score.name for score in drawing.run.scores if score.family == "baseline"}
    return [
        Curve(name, number, x, y, drawing.colours.get(name, FAINT), name in baseline, name in drawing.colours)
        for number, (name, (x, y)) in enumerate(points.items())
    ]


def _with_legend(drawing: Drawing, title: str, picture: Markup, curves: list[Curve], column: Column) -> Markup:
    """The picture and its legend, the best score first, each line with the figure from the run's metrics."""
    kind, entries = column.kind, find_columns(drawing.run).get(column, {})
    values = {curve.name: known_value(entries, curve.name) for curve in curves}
    ordered = sorted(curves, key=lambda c: math.inf if (v := values[c.name]) is None else -v if kind.higher else v)
    items = [_legend_line(curve, percent(values[curve.name], kind.digits)) for curve in ordered]
    head = tag("p", f"{kind.title} {kind.arrow}, best first", class_="small")
    body = tag("div", picture, tag("div", head, tag("ol", items, class_="legend")))
    return tag("figure", tag("figcaption", tag("b", title)), body, class_="curves")


def _legend_line(curve: Curve, figure: str) -> Markup:
    colour = f"border-color:{colour_variable(curve.colour)}"
    return tag(
        "li",
        tag("span", class_="dash" if curve.dashed else "line", style=colour),
        tag("span", breakable(curve.name), class_="name"),
        tag("span", figure, class_="n"),
        data_curve=curve.number,
        tabindex=0,
    )


def correlation_figure(drawing: Drawing) -> Markup | None:
    """Spearman correlations of all scores over in-distribution rows; None for fewer than two scores or rows."""
    names = ordered_scores(drawing.run)
    places = drawing.inside or list(drawing.rows)
    if len(names) < 2 or not places:
        return None
    columns = np.stack(
        [np.concatenate([drawing.rows[place].scores[name] for place in places]) for name in names], axis=1
    )
    columns = columns[np.isfinite(columns).all(axis=1)]
    if len(columns) < 2:
        return None
    split = sum(score.family == "baseline" for score in drawing.run.scores)
    label = f"Spearman rank correlations between {len(names)} scores, times 100."
    picture = heat_map_svg(names, spearman(columns), split, label, "h")
    width = float(picture.split('viewBox="0 0 ', 1)[1].split(" ", 1)[0])
    return tag("div", tag("figure", picture, style=f"width:{width:.0f}px"), class_="scroll heat", tabindex=0)
