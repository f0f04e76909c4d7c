"""The plots of the report as inline SVG, in the colours of the page, light or dark. Text remains text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from lightning_gradmetrics.report.run import Floats
from lightning_gradmetrics.report.svg import Axis, Drawing, linear_ticks, log_ticks

__all__ = ["CARD_SIZE", "PANEL_SIZE", "Line", "curves_svg", "histogram_svg", "line_styles", "strip_svg"]

SERIES = ("var(--s1)", "var(--s2)", "var(--s3)", "var(--s4)", "var(--s5)", "var(--s6)")
"""The CSS colours of curves and groups; the first curve has the colour of text."""

DASHES = ("", "6 2", "2 1.5", "7 2 2 2", "9 2 2 2 2 2")
PANEL_SIZE = (4.0, 3.0)
CARD_SIZE = (2.8, 2.3)
"""Size of a picture in a card, in inches; cards are narrower than panels."""


@dataclass(frozen=True)
class Line:
    """A curve: its points ``(P,)`` and the number of its style (None: a grey background curve)."""

    name: str
    x: Floats
    y: Floats
    style: int | None = None


def line_styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return the CSS colour and the dashes of each highlighted curve; max softmax, the first, has the text colour."""
    styles = {}
    for number, name in enumerate(names):
        styles[name] = (_colour(number), DASHES[number % len(DASHES)])
    return styles


def _colour(style: int) -> str:
    return "var(--ink)" if style == 0 else SERIES[style - 1]


def curves_svg(
    lines: Sequence[Line],
    *,
    labels: tuple[str, str],
    top: float,
    dotted: Sequence[Line],
    title: str,
    key: str,
    size: tuple[float, float] = PANEL_SIZE,
) -> Markup:
    """Return a drawing of curves over the unit interval, with the highlighted ones on top.

    Args:
        lines: The curves.
        labels: The labels of both axes.
        top: The upper end of the vertical axis; curves may exceed it.
        dotted: Reference lines, such as chance.
        title: The text alternative.
        key: Makes the ids of the drawing unique on the page.
        size: The width and height in inches; in a narrow column, text in a smaller drawing appears larger.
    """
    width, height = size
    across = Axis(0.0, 100.0, linear_ticks(0, 100), labels[0])
    down = Axis(0.0, 100 * top, linear_ticks(0, 100 * top), labels[1])
    drawing = Drawing(size, (0.48, 0.45, width - 0.12, height - 0.09), across, down, title, key)
    drawing.frame()
    for line in dotted:
        drawing.line(100 * line.x, 100 * line.y, "var(--muted)", 1, "1 1.65")
    for line in sorted(lines, key=_order):
        if line.style is None:
            x, y = _thinned(line.x, line.y, 120)
            drawing.line(100 * x, 100 * y, "var(--faint)", 0.6)
        else:
            x, y = _thinned(line.x, line.y, 300)
            drawing.line(100 * x, 100 * y, _colour(line.style), 1.6, DASHES[line.style % len(DASHES)])
    return drawing.markup()


def _order(line: Line) -> float:
    """Return the place of a curve in the order of drawing: the grey ones first, the first style last."""
    return -np.inf if line.style is None else -line.style


def _thinned(x: Floats, y: Floats, steps: int) -> tuple[Floats, Floats]:
    """Drop points that differ from the previous one by less than a grid step."""
    cells = np.round(np.stack([x, y]) * steps)
    keep = np.append(True, np.any(np.diff(cells, axis=1) != 0, axis=0))
    keep[-1] = True
    return x[keep], y[keep]


def histogram_svg(groups: Mapping[str, Floats], *, title: str, key: str) -> Markup:
    """Return the histograms of groups ``(N,)`` below each other on one axis, each scaled to its highest bin.

    Args:
        groups: Finite values by group.
        title: The text alternative.
        key: Makes the ids of the drawing unique on the page.
    """
    values = np.concatenate(list(groups.values()))
    low, high = np.quantile(values, [0.005, 0.995])
    if not high > low:
        low, high = low - max(1.0, abs(low)) / 2, high + max(1.0, abs(high)) / 2
    is_log, edges = _bins(float(low), float(high))
    first, last = float(edges[0]), float(edges[-1])
    height = 0.55 + 0.42 * len(groups)
    ticks = log_ticks(first, last) if is_log else linear_ticks(first, last, 7)
    across, down = Axis(first, last, ticks, is_log=is_log), Axis(-len(groups) + 0.9, 1.05)
    drawing = Drawing((4.0, height), (0.12, 0.25, 3.88, height - 0.05), across, down, title, key)
    drawing.frame("bottom", grid=False)
    for number, group in enumerate(groups.values()):
        base = -float(number)
        drawing.line(edges[[0, -1]], np.full(2, base), "var(--grid)", 0.6)
        counts, _ = np.histogram(np.clip(group, first, last), edges)
        tops = base + 0.95 * counts / max(1, counts.max())
        x, y = np.repeat(edges, 2), np.concatenate([[base], np.repeat(tops, 2), [base]])
        drawing.line(x, y, "", 0, fill=SERIES[number % len(SERIES)])
        drawing.line(np.full(2, np.median(group)), np.array([base, base + 0.95]), "var(--ink)", 1.2)
    return drawing.markup()


def strip_svg(values: Mapping[str, Floats], *, label: str, title: str, key: str) -> Markup:
    """Return the values ``(R,)`` of each name as dots on a line, with a mark at the mean and the first name on top.

    Args:
        values: Values in [0, 1] by name.
        label: The label of the axis, in percent.
        title: The text alternative.
        key: Makes the ids of the drawing unique on the page.
    """
    height = 0.5 + 0.2 * len(values)
    percents = 100 * np.concatenate(list(values.values()))
    margin = 0.05 * float(np.ptp(percents)) or 1.0
    low, high = float(percents.min()) - margin, float(percents.max()) + margin
    across = Axis(low, high, linear_ticks(low, high, 7), label)
    down = Axis(len(values) - 0.5, -0.5, list(enumerate(values)))
    drawing = Drawing((4.0, height), (1.68, 0.42, 3.88, height - 0.04), across, down, title, key)
    drawing.frame("bottom")
    for row, numbers in enumerate(values.values()):
        drawing.dots(100 * numbers, np.full(len(numbers), row), SERIES[1], 1.75)
        drawing.line(np.full(2, 100 * numbers.mean()), np.array([row - 0.35, row + 0.35]), "var(--ink)", 1.2)
    return drawing.markup()


def _bins(low: float, high: float, count: int = 36) -> tuple[bool, Floats]:
    """Return whether the axis is logarithmic, which it is if the values span three decades, and the edges of the bins."""
    if low > 0 and high / low > 1000:
        return True, np.geomspace(low, high, count + 1)
    if high < 0 and low / high > 1000:
        return True, -np.geomspace(-low, -high, count + 1)
    return False, np.linspace(low, high, count + 1)
