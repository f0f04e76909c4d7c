"""Choosing what is drawn: which rows, which curves stand out and in which colour, and the pictures with their legends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_gradmetrics.report.columns import Column, best_values, find_columns, ordered_scores, percent
from lightning_gradmetrics.report.curves import Floats, risk_coverage_curve, roc_curve, spearman
from lightning_gradmetrics.report.markup import Markup, join, tag
from lightning_gradmetrics.report.plots import Curve, Group, curves_svg, distribution_svg, heat_map_svg
from lightning_gradmetrics.report.run import Rows, Run
from lightning_gradmetrics.report.svg import FAINT, SERIES, colour_variable
from lightning_gradmetrics.report.tables import family_mark

__all__ = ["Drawing", "correlation_figure", "distribution_figures", "risk_figures", "roc_figures", "start_drawing"]

MAX_ROWS = 50_000
"""At most about this many rows are drawn, shared evenly among the data sets."""
MAX_PANELS = 12
_GRADIENT_COLOURS = (SERIES[0], SERIES[2], SERIES[3], SERIES[5])
_BASELINE_COLOURS = (SERIES[1], SERIES[4], SERIES[6])


@dataclass(frozen=True)
class Drawing:
    """The run, the finite rows of it that are drawn, and a colour for each score that stands out."""

    run: Run
    rows: Mapping[str, Rows]
    sampled: bool
    colours: Mapping[str, str]

    @property
    def inside(self) -> list[str]:
        """Names of the in-distribution sets that have rows to draw."""
        return [dataset.name for dataset in self.run.datasets if dataset.role == "id" and dataset.name in self.rows]

    def values(self, datasets: Iterable[str], score: str) -> Floats:
        """Finite values of a score over the named data sets."""
        columns = [self.rows[name].scores[score] for name in datasets if name in self.rows]
        joined: Floats = np.concatenate([*columns, np.empty(0)])
        finite: Floats = joined[np.isfinite(joined)]
        return finite


def start_drawing(run: Run, max_rows: int = MAX_ROWS) -> Drawing:
    """Keep finite rows, thin large data sets with a fixed seed, and give the leading scores their colours."""
    finite = {
        dataset.name: run.rows[dataset.name].take(run.rows[dataset.name].finite)
        for dataset in run.datasets
        if dataset.name in run.rows
    }
    finite = {name: rows for name, rows in finite.items() if len(rows)}
    share = max(200, max_rows // max(1, len(finite)))
    random = np.random.default_rng(0)
    drawn = {name: rows.take(_some(len(rows), share, random)) for name, rows in finite.items()}
    sampled = any(len(drawn[name]) < len(rows) for name, rows in finite.items())
    return Drawing(run, drawn, sampled, _colours(run))


def _some(count: int, most: int, random: np.random.Generator) -> NDArray[np.int64]:
    chosen = np.arange(count) if count <= most else np.sort(random.choice(count, most, replace=False))
    return chosen.astype(np.int64)


def _colours(run: Run) -> dict[str, str]:
    """Colours for four gradient scores and three baselines: the best of each column first, then by mean AUROC."""
    baseline = {score.name for score in run.scores if score.family == "baseline"}
    columns = {column: entries for column, entries in find_columns(run).items() if column.metric == "auroc"}
    colours: dict[str, str] = {}
    for side, palette in ((False, _GRADIENT_COLOURS), (True, _BASELINE_COLOURS)):
        names = [score.name for score in run.scores if (score.name in baseline) is side]
        first = [best_values(c, {n: e for n, e in entries.items() if n in names})[:1] for c, entries in columns.items()]
        means = {name: np.mean([_value(entries, name) for entries in columns.values()] or [0.0]) for name in names}
        ranked = dict.fromkeys(
            [*(name for best in first for name in best), *sorted(names, key=lambda name: -means[name])]
        )
        colours |= dict(zip(ranked, palette, strict=False))
    return colours


def _value(entries: Mapping[str, object], name: str) -> float:
    value = getattr(entries.get(name), "value", None)
    return float(value) if value is not None and math.isfinite(value) else 0.0


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
        caption = tag("figcaption", tag("b", name), " ", family_mark(scores[name]), _summary(scores[name].summary))
        panels.append(tag("figure", caption, picture))
    return tag("div", panels, class_="panels")


def _summary(text: str) -> Markup | None:
    return tag("span", text, class_="small") if text else None


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
        panels.append(_with_legend(drawing, place, picture, curves, Column("misprediction", place, "aurc")))
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
    entries = find_columns(drawing.run).get(column, {})
    sign = -1 if column.kind.higher else 1

    def place(curve: Curve) -> float:
        value = getattr(entries.get(curve.name), "value", None)
        return sign * value if value is not None and math.isfinite(value) else math.inf

    items = [
        tag(
            "li",
            tag(
                "span", class_="dash" if curve.dashed else "line", style=f"border-color:{colour_variable(curve.colour)}"
            ),
            tag("span", curve.name, class_="name"),
            tag("span", percent(getattr(entries.get(curve.name), "value", None), column.kind.digits), class_="n"),
            data_curve=curve.number,
            tabindex=0,
        )
        for curve in sorted(curves, key=place)
    ]
    head = tag("p", f"{column.kind.title} {column.kind.arrow}, best first", class_="small")
    return tag(
        "figure", tag("figcaption", tag("b", title)), picture, head, tag("ol", items, class_="legend"), class_="curves"
    )


def correlation_figure(drawing: Drawing) -> Markup | None:
    """Spearman correlation of every pair of scores over the in-distribution rows; None for fewer than two scores or rows."""
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
    return join(tag("div", tag("figure", picture, style=f"width:{width:.0f}px"), class_="scroll heat", tabindex=0))
