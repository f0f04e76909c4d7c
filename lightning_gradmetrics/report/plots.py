"""Matplotlib figures as inline SVG in the colours of the page, light or dark.

A figure is drawn in placeholder colours, which are replaced by CSS variables of the page. Text remains text.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_gradmetrics.report.run import Floats

__all__ = ["CARD_SIZE", "PANEL_SIZE", "Line", "curves_svg", "histogram_svg", "line_styles", "strip_svg"]

INK, MUTED, GRID, FAINT = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
SERIES = ("#0a0c01", "#0a0c02", "#0a0c03", "#0a0c04", "#0a0c05", "#0a0c06")
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", FAINT: "--faint"}
DASHES = ("", "6 2", "2 1.5", "7 2 2 2", "9 2 2 2 2 2")
PANEL_SIZE = (4.0, 3.0)
CARD_SIZE = (2.8, 2.3)
"""Size of a picture in a card, in inches; cards are narrower than panels."""
SETTINGS: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.4,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


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
        colour = "var(--ink)" if number == 0 else f"var(--s{number})"
        styles[name] = (colour, DASHES[number % len(DASHES)])
    return styles


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
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=size, facecolor="none")
        axes = figure.add_axes((0.48 / width, 0.45 / height, 1 - 0.6 / width, 1 - 0.54 / height), facecolor="none")
        axes.set(xlim=(0, 100), ylim=(0, 100 * top), xlabel=labels[0], ylabel=labels[1])
        for line in dotted:
            axes.plot(100 * line.x, 100 * line.y, ":", color=MUTED, linewidth=1)
        for line in sorted(lines, key=lambda line: line.style is not None):
            _draw(axes, line)
        return _svg(figure, title, key)


def _draw(axes: Axes, line: Line) -> None:
    x, y = _thinned(line.x, line.y, 120 if line.style is None else 300)
    if line.style is None:
        axes.plot(100 * x, 100 * y, color=FAINT, linewidth=0.6)
        return
    dashes = np.fromstring(DASHES[line.style % len(DASHES)], sep=" ") / 1.6
    colour = INK if line.style == 0 else SERIES[line.style - 1]
    (drawn,) = axes.plot(100 * x, 100 * y, color=colour, linewidth=1.6, zorder=5 - line.style / 10)
    if len(dashes):
        drawn.set_dashes(dashes.tolist())


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
    scale, edges = _bins(float(low), float(high))
    height = 0.55 + 0.42 * len(groups)
    with matplotlib.rc_context({**SETTINGS, "axes.grid": False, "axes.spines.left": False}):
        figure = Figure(figsize=(4.0, height), facecolor="none")
        axes = figure.add_axes((0.03, 0.25 / height, 0.94, 1 - 0.3 / height), facecolor="none")
        axes.set(yticks=[], xlim=(edges[0], edges[-1]), ylim=(-len(groups) + 0.9, 1.05))
        if scale == "log":
            axes.set_xscale("log")
        elif scale == "symlog":
            axes.set_xscale("symlog", linthresh=abs(edges[-1]))
        for number, group in enumerate(groups.values()):
            counts, _ = np.histogram(np.clip(group, edges[0], edges[-1]), edges)
            base = -float(number)
            tops = base + 0.95 * counts / max(1, counts.max())
            colour = SERIES[number % len(SERIES)]
            axes.stairs(tops, edges, baseline=base, fill=True, facecolor=colour, alpha=0.55)
            axes.axhline(base, color=GRID, linewidth=0.6)
            axes.plot(np.full(2, np.median(group)), [base, base + 0.95], color=INK, linewidth=1.2)
        return _svg(figure, title, key)


def strip_svg(values: Mapping[str, Floats], *, label: str, title: str, key: str) -> Markup:
    """Return the values ``(R,)`` of each name as dots on a line, with a mark at the mean and the first name on top.

    Args:
        values: Values in [0, 1] by name.
        label: The label of the axis, in percent.
        title: The text alternative.
        key: Makes the ids of the drawing unique on the page.
    """
    height = 0.5 + 0.2 * len(values)
    with matplotlib.rc_context({**SETTINGS, "axes.spines.left": False}):
        figure = Figure(figsize=(4.0, height), facecolor="none")
        axes = figure.add_axes((0.42, 0.42 / height, 0.55, 1 - 0.46 / height), facecolor="none")
        axes.set(yticks=range(len(values)), yticklabels=list(values), ylim=(len(values) - 0.5, -0.5), xlabel=label)
        axes.tick_params(axis="y", length=0)
        for row, numbers in enumerate(values.values()):
            axes.plot(100 * numbers, np.full(len(numbers), row), "o", color=SERIES[1], markersize=3.5, alpha=0.7)
            axes.plot(np.full(2, 100 * numbers.mean()), [row - 0.35, row + 0.35], color=INK, linewidth=1.2)
        return _svg(figure, title, key)


def _bins(low: float, high: float, count: int = 36) -> tuple[str, Floats]:
    """Return the scale of the axis and the edges of the bins: logarithmic if the values span three decades."""
    if low > 0 and high / low > 1000:
        return "log", np.geomspace(low, high, count + 1)
    if high < 0 and low / high > 1000:
        return "symlog", -np.geomspace(-low, -high, count + 1)
    return "linear", np.linspace(low, high, count + 1)


def _svg(figure: Figure, title: str, key: str) -> Markup:
    """Return a figure as an ``<svg>`` element that screen readers announce as one image."""
    buffer = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": key}):
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the browser uses other fonts
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("xlink:href", "href")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    for number, colour in enumerate(SERIES, 1):
        text = text.replace(colour, f"var(--s{number})")
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{key}-", text)
    text = re.sub(r"(\d\.\d)\d+", r"\1", text)
    text = re.sub(r" font-family: [^;\"]*;", "", text)  # the page sets the font
    text = re.sub(r"\s*\n\s*", " ", text)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))
