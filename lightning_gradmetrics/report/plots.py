"""The pictures of the report, each as one small SVG: distributions, curves, and the correlation heat map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon

from lightning_gradmetrics.report.axis import choose_axis
from lightning_gradmetrics.report.curves import Floats, thin
from lightning_gradmetrics.report.markup import Markup
from lightning_gradmetrics.report.svg import FAINT, GRID, INK, MUTED, new_axes, to_svg

__all__ = ["Curve", "Group", "curves_svg", "distribution_svg", "heat_map_svg", "plot_text"]

_BINS = 48
_STEPS = 150


@dataclass(frozen=True)
class Group:
    """Rows that are drawn together: their name, stand-in colour and finite values of one score."""

    name: str
    colour: str
    values: Floats


@dataclass(frozen=True)
class Curve:
    """A line over the unit square; ``number`` is its score's place in the run, ``front`` puts it before grey ones."""

    name: str
    number: int
    x: Floats
    y: Floats
    colour: str = FAINT
    dashed: bool = False
    front: bool = False


def plot_text(text: str, length: int) -> str:
    r"""On one line, at most ``length`` characters (the middle is cut: endings tell names apart), and no mathematics.

    Example:
        >>> plot_text("pseudo_label_l2_all", 11), plot_text("in $", 11)
        ('pseud…2_all', 'in \\$')
    """
    text = " ".join(text.split())
    if len(text) > length:
        head = length // 2
        text = f"{text[:head]}…{text[len(text) - (length - head - 1) :]}"
    return text.replace("$", r"\$")


def distribution_svg(groups: Sequence[Group], label: str, prefix: str) -> Markup:
    """One row a group over a shared axis: a histogram scaled to its own highest bin, and a tick at the median."""
    names = [plot_text(group.name, 18) for group in groups]
    left = 14 + 5.6 * max(map(len, names))
    height = 30 * len(groups)
    axes = new_axes(340, height + 26, (left, 8, 22, 4))
    axis = choose_axis([group.values for group in groups])
    for row, group in enumerate(reversed(groups)):
        _draw_row(axes, row, axis.place(group.values), group.colour, (axis.low, axis.high))
    axes.set(xlim=(axis.low, axis.high), ylim=(-0.08, len(groups)))
    axes.set_axis_off()
    beside = axes.get_yaxis_transform()
    for row, name in enumerate(reversed(names)):
        axes.text(-0.015, row + 0.3, name, color=INK, size=10, ha="right", va="center", transform=beside)
    _draw_ticks(axes, axis.ticks, 1 / height)
    return to_svg(axes, label, prefix)


def _draw_ticks(axes: Axes, ticks: Sequence[tuple[float, str]], point: float) -> None:
    """A base line with ticks and texts, by hand: matplotlib's own axis takes half of a panel's time."""
    base = axes.get_xaxis_transform()
    axes.add_artist(Line2D([0, 1], [0, 0], color=GRID, linewidth=0.8, transform=axes.transAxes))
    for place, text in ticks:
        axes.add_artist(
            Line2D([place, place], [0, -3 * point], color=GRID, linewidth=0.8, transform=base, clip_on=False)
        )
        axes.text(place, -5 * point, _minus(text), color=MUTED, size=10, ha="center", va="top", transform=base)


def _draw_row(axes: Axes, row: int, places: Floats, colour: str, limits: tuple[float, float]) -> None:
    counts, edges = np.histogram(places, bins=_BINS, range=limits)
    heights = row + 0.86 * counts / max(1, counts.max())
    x, y = np.repeat(edges, 2), np.concatenate([[row], np.repeat(heights, 2), [row]])
    outline = np.stack([x, y], axis=1)
    axes.add_artist(Polygon(outline, facecolor=to_rgba(colour, 0.35), edgecolor=colour, linewidth=1))
    if len(places):
        axes.add_artist(Line2D([np.median(places)] * 2, [row, row + 0.86], color=INK, linewidth=1.6))


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def curves_svg(
    curves: Sequence[Curve],
    references: Sequence[Curve],
    axis_names: tuple[str, str],
    top: float,
    label: str,
    prefix: str,
) -> Markup:
    """Lines in one square: grey ones behind, highlighted ones in colour, references dotted.

    Args:
        curves: One a score.
        references: Lines to compare with, such as chance.
        axis_names: Of the horizontal and the vertical axis.
        top: Upper limit of the vertical axis.
        label: The alternative text.
        prefix: Makes ids unique.
    """
    axes = new_axes(360, 300, (46, 12, 38, 8))
    axes.grid(color=GRID, linewidth=0.6, alpha=0.6)
    for line in references:
        axes.plot(line.x, line.y, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    for line in sorted(curves, key=lambda line: line.front):
        x, y = thin(line.x, np.minimum(line.y / top, 1.2), _STEPS)
        style = (0, (4, 1.6)) if line.dashed else "-"
        width = 1.8 if line.front else 0.9
        axes.plot(x, y * top, color=line.colour, linewidth=width, linestyle=style, gid=f"curve curve-{line.number}")
    axes.set(xlim=(0, 1), ylim=(0, top), xlabel=plot_text(axis_names[0], 56), ylabel=plot_text(axis_names[1], 44))
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g}")
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.3g}")
    return to_svg(axes, label, prefix)


def heat_map_svg(names: Sequence[str], values: Floats, split: int, label: str, prefix: str) -> Markup:
    """Squares from blue (-1) over white (0) to red (+1), the value x 100 written in each; a gap after ``split`` rows.

    Args:
        names: Of rows and columns.
        values: ``(S, S)``, NaN where there is no figure.
        split: Number of leading names that are set apart from the rest.
        label: The alternative text.
        prefix: Makes ids unique.
    """
    side, short = 27.0, [plot_text(name, 26) for name in names]
    margin = 12 + 5.6 * max(map(len, short))
    size = side * len(names) + (4 if 0 < split < len(names) else 0)
    axes = new_axes(size + margin + 4, size + margin + 4, (margin, 4, 4, margin))
    at = [i * side + (4 if 0 < split <= i else 0) for i in range(len(names))]
    corners = [(at[j], at[i]) for i, j in np.ndindex(values.shape)]
    _draw_cells(axes, corners, side, values.ravel())
    axes.set(xlim=(0, size), ylim=(size, 0))
    centres = [place + side / 2 for place in at]
    axes.set_xticks(centres, short, rotation=90)
    axes.xaxis.tick_top()
    axes.set_yticks(centres, short)
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    return to_svg(axes, label, prefix)


def _draw_cells(axes: Axes, corners: Sequence[tuple[float, float]], side: float, values: Floats) -> None:
    boxes = [[(x, y), (x + side - 1, y), (x + side - 1, y + side - 1), (x, y + side - 1)] for x, y in corners]
    faces = [_diverging(value) if np.isfinite(value) else "none" for value in values]
    axes.add_artist(PolyCollection(boxes, facecolors=faces, edgecolors="none"))
    for (x, y), value in zip(corners, values, strict=True):
        ink = "#ffffff" if abs(value) > 0.55 else "#111111" if np.isfinite(value) else MUTED
        text = _minus(f"{100 * value:.0f}".replace("-0", "0")) if np.isfinite(value) else "–"
        axes.text(x + side / 2, y + side / 2, text, color=ink, size=9, ha="center", va="center")


def _diverging(value: float) -> tuple[float, float, float]:
    """White at 0 to a dark red at +1 and a dark blue at -1: two hues that colour-blind readers tell apart."""
    end = np.array((0.60, 0.05, 0.12) if value > 0 else (0.02, 0.24, 0.48))
    red, green, blue = 1 + (end - 1) * abs(value) ** 0.9
    return float(red), float(green), float(blue)
