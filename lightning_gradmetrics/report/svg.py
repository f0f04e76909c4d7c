"""Plots as inline SVG: a drawing with axes, in which data coordinates become points of 1/72 inch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from lightning_gradmetrics.report.run import Floats
from lightning_gradmetrics.results.escaping import visible

__all__ = ["Axis", "Drawing", "linear_ticks", "log_ticks"]

POINTS = 72.0
"""Units of the drawing per inch."""

TICK, LABEL = 8, 9
"""Font sizes of ticks and of the labels of the axes."""

Ticks = Sequence[tuple[float, str]]
"""The value and the text of each tick."""

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def linear_ticks(low: float, high: float, most: int = 9) -> Ticks:
    """Return round numbers between two values, with as many decimals as they need; fewer of them if they are long.

    Example:
        >>> linear_ticks(0, 9, 5), linear_ticks(-0.2, 0.3, 3)
        ([(0.0, '0'), (2.0, '2'), (4.0, '4'), (6.0, '6'), (8.0, '8')], [(-0.2, '−0.2'), (0.0, '0.0'), (0.2, '0.2')])
    """
    values = np.asarray(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    step = float(np.diff(values).min())
    decimals = 1 - math.floor(math.log10(step))
    decimals -= abs(round(step, decimals - 1) - step) < 1e-6 * step  # all steps but 2.5 have one digit
    largest = float(np.abs(values).max())
    ticks = []
    for value in values[(values >= low) & (values <= high)].tolist():
        text = f"{value + 0.0:.{max(0, decimals)}f}"
        if largest >= 1e6 or decimals > 5:
            text = f"{value + 0.0:.{max(1, decimals + math.floor(math.log10(largest)) + 1)}g}"
        ticks.append((value, text.replace("-", "−")))
    is_long = most > 4 and any(len(text) > 7 for _, text in ticks)
    return linear_ticks(low, high, 4) if is_long else ticks


def log_ticks(low: float, high: float, most: int = 6) -> Ticks:
    """Return powers of ten between two positive or two negative values.

    Example:
        >>> log_ticks(0.002, 30.0), log_ticks(-200.0, -0.5)
        ([(0.01, '10⁻²'), (0.1, '10⁻¹'), (1.0, '10⁰'), (10.0, '10¹')], [(-100.0, '−10²'), (-10.0, '−10¹'), (-1.0, '−10⁰')])
    """
    least, largest = sorted((math.log10(abs(low)), math.log10(abs(high))))
    first, last = math.ceil(least - 1e-9), math.floor(largest + 1e-9)
    step = max(1, math.ceil((last - first + 1) / most))
    ticks = []
    for exponent in range(first, last + 1, step):
        text = f"10{str(exponent).translate(SUPERSCRIPTS)}"
        ticks.append((10.0**exponent, text) if low > 0 else (-(10.0**exponent), f"−{text}"))
    return ticks if low > 0 else ticks[::-1]


@dataclass(frozen=True)
class Axis:
    """An axis from ``low`` to ``high``; a logarithmic one if ``is_log``, with both ends positive or both negative."""

    low: float
    high: float
    ticks: Ticks = ()
    label: str = ""
    is_log: bool = False

    def fractions(self, values: Floats) -> Floats:
        """Return where values ``(P,)`` are on the axis: 0 at its low end, 1 at its high end."""
        low, high = self._place(np.array([self.low, self.high]))
        placed: Floats = (self._place(np.asarray(values, dtype=np.float64)) - low) / (high - low)
        return placed

    def _place(self, values: Floats) -> Floats:
        if not self.is_log:
            return values
        magnitudes: Floats = np.log(np.abs(values))
        return magnitudes if self.low > 0 else -magnitudes


@dataclass
class Drawing:
    """An SVG drawing with one pair of axes.

    Args:
        size: The width and height in inches.
        box: The left, lower, right and upper end of the axes, in inches from the lower left corner.
        x: The horizontal axis.
        y: The vertical axis.
        title: The text alternative.
        key: Makes the id of the drawing unique on the page.
    """

    size: tuple[float, float]
    box: tuple[float, float, float, float]
    x: Axis
    y: Axis
    title: str
    key: str
    root: ElementTree.Element = field(init=False)

    def __post_init__(self) -> None:
        width, height = POINTS * self.size[0], POINTS * self.size[1]
        size = {"width": f"{width:g}pt", "height": f"{height:g}pt", "viewBox": f"0 0 {width:g} {height:g}"}
        self.root = ElementTree.Element("svg", {"role": "img", "aria-label": visible(self.title), **size})
        left, lower, right, upper = POINTS * np.array(self.box)
        clip = ElementTree.SubElement(self.root, "clipPath", id=f"{self.key}-box")
        place = {"x": f"{left:.1f}", "y": f"{height - upper:.1f}"}
        ElementTree.SubElement(
            clip, "rect", {**place, "width": f"{right - left:.1f}", "height": f"{upper - lower:.1f}"}
        )

    def across(self, values: Floats) -> Floats:
        """Return the horizontal positions of values ``(P,)``, in points."""
        left, _, right, _ = self.box
        return POINTS * (left + (right - left) * self.x.fractions(values))

    def down(self, values: Floats) -> Floats:
        """Return the vertical positions of values ``(P,)``, in points from the top."""
        _, lower, _, upper = self.box
        return POINTS * (self.size[1] - lower - (upper - lower) * self.y.fractions(values))

    def line(self, x: Floats, y: Floats, stroke: str, width: float, dashes: str = "", fill: str = "") -> None:
        """Draw a line through points ``(P,)``, cut off at the axes; with ``fill``, an area without a line.

        Args:
            x: Horizontal values.
            y: Vertical values.
            stroke: The CSS colour.
            width: The width of the line in points.
            dashes: The lengths of dashes and gaps in points.
            fill: The CSS colour of the area.
        """
        style = f"fill: none; stroke: {stroke}; stroke-width: {width:g}; stroke-linejoin: round"
        if fill:
            style = f"fill: {fill}; fill-opacity: 0.55"
        elif dashes:
            style += f"; stroke-dasharray: {dashes}"
        points = " ".join(map("{:.1f},{:.1f}".format, self.across(x).tolist(), self.down(y).tolist()))
        attributes = {"points": points, "style": style, "clip-path": f"url(#{self.key}-box)"}
        ElementTree.SubElement(self.root, "polygon" if fill else "polyline", attributes)

    def dots(self, x: Floats, y: Floats, fill: str, radius: float) -> None:
        """Draw dots at points ``(P,)`` in a CSS colour; the radius is in points."""
        for across, down in zip(self.across(x).tolist(), self.down(y).tolist(), strict=True):
            place = {"cx": f"{across:.1f}", "cy": f"{down:.1f}", "r": f"{radius:g}"}
            ElementTree.SubElement(self.root, "circle", {**place, "style": f"fill: {fill}; fill-opacity: 0.7"})

    def frame(self, sides: str = "left bottom", grid: bool = True) -> None:
        """Draw the axes with ticks and labels, before the data: the lines of ``sides``, and with ``grid`` lines at the ticks."""
        left, lower, right, upper = (POINTS * np.array(self.box)).tolist()
        top, bottom = POINTS * self.size[1] - upper, POINTS * self.size[1] - lower
        for value, text in self.x.ticks:
            at = float(self.across(np.array([value]))[0])
            self._stroke((at, top if grid else bottom, at, bottom + 3))
            self._text(text, at, bottom + 11, "middle", TICK)
        for value, text in self.y.ticks:
            at = float(self.down(np.array([value]))[0])
            if grid:
                self._stroke((left - 3, at, right, at))
            self._text(text, left - 5, at + 3, "end", TICK)
        for side, ends in {"left": (left, top, left, bottom), "bottom": (left, bottom, right, bottom)}.items():
            if side in sides:
                self._stroke(ends, 0.8)
        if self.x.label:
            self._text(self.x.label, (left + right) / 2, bottom + 23, "middle", LABEL)
        if self.y.label:
            self._text(self.y.label, LABEL, (top + bottom) / 2, "middle", LABEL, turned=True)

    def _stroke(self, ends: tuple[float, float, float, float], width: float = 0.4) -> None:
        path, style = "M{:.1f} {:.1f}L{:.1f} {:.1f}".format(*ends), f"stroke: var(--grid); stroke-width: {width:g}"
        ElementTree.SubElement(self.root, "path", {"d": path, "style": style})

    def _text(self, text: str, x: float, y: float, anchor: str, size: int, turned: bool = False) -> None:
        place = {"x": f"{x:.1f}", "y": f"{y:.1f}"}
        if turned:
            place["transform"] = f"rotate(-90 {x:.1f} {y:.1f})"
        style = f"fill: var(--muted); font-size: {size}px; text-anchor: {anchor}"
        ElementTree.SubElement(self.root, "text", {**place, "style": style}).text = visible(text)

    def markup(self) -> Markup:
        """Return the ``<svg>`` element, which screen readers announce as one image."""
        return Markup(ElementTree.tostring(self.root, encoding="unicode"))
