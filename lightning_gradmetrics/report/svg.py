"""Matplotlib figures as small inline SVG that follows the page's colours, light or dark.

A figure is drawn in stand-in colours. Each is replaced by a CSS variable of the page, so one drawing serves both
schemes and print. Text stays text. Nothing of matplotlib's global state is left changed, and pyplot is not used.
"""

from __future__ import annotations

import re
import warnings
from io import StringIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from lightning_gradmetrics.report.markup import Markup, tag

__all__ = ["FAINT", "GRID", "INK", "MUTED", "PAPER", "SERIES", "colour_variable", "new_axes", "to_svg"]

INK, MUTED, GRID, PAPER, FAINT = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05"
SERIES = tuple(f"#0a0c{i:02x}" for i in range(1, 8))
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper", FAINT: "--faint"} | {
    colour: f"--s{i}" for i, colour in enumerate(SERIES, 1)
}


def colour_variable(colour: str) -> str:
    """The CSS value that stands for a stand-in colour on the page.

    Example:
        >>> colour_variable(SERIES[0])
        'var(--s1)'
    """
    return f"var({_VARIABLES[colour]})"


def new_axes(width: float, height: float, margins: tuple[float, float, float, float]) -> Axes:
    """Axes in a new figure; sizes and margins (left, right, bottom, top) in points, the units of the SVG's view box."""
    left, right, bottom, top = margins
    figure = Figure(figsize=(width / 72, height / 72), facecolor="none")
    FigureCanvasSVG(figure)
    box = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    axes = figure.add_axes(box, facecolor="none")
    axes.tick_params(colors=GRID, labelcolor=MUTED, labelsize=10, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.set_axisbelow(True)
    axes.xaxis.label.set(color=MUTED, size=10)
    axes.yaxis.label.set(color=MUTED, size=10)
    return axes


def to_svg(axes: Axes, label: str, prefix: str) -> Markup:
    """The figure of ``axes`` as an inline ``<svg>``.

    Args:
        axes: Axes from :func:`new_axes`. An artist's gid becomes its group's class.
        label: What a reader who cannot see the picture should know.
        prefix: Makes the ids of this drawing unique on the page.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    buffer = StringIO()
    with (
        warnings.catch_warnings(),
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "path.simplify": True}),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the browser has its own fonts
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawing = buffer.getvalue()
    width, height = (72 * size for size in figure.get_size_inches())
    body = _tidy(drawing[drawing.index(">", drawing.index("<svg")) + 1 : drawing.rindex("</svg>")], prefix)
    return tag("svg", Markup(body), viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label)


def _tidy(body: str, prefix: str) -> str:
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    used = set(re.findall(r"url\(#([^)]+)\)", body)) | set(re.findall(r'href="#([^"]+)"', body))
    body = re.sub(r' id="([^"]+)"', lambda match: _identity(match[1], used, prefix), body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", body)
    body = re.sub("#0a0[bc][0-9a-f]{2}", lambda match: colour_variable(match[0]), body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    body = re.sub(r"(\d\.\d{2})\d+", r"\1", body)
    return re.sub(r"\s*\n\s*", "\n", body)


def _identity(name: str, used: set[str], prefix: str) -> str:
    """Ids that are pointed at stay, unique to the page; a gid is a class; the rest go."""
    if name in used:
        return f' id="{prefix}-{name}"'
    return f' class="{name}"' if name.startswith("curve") else ""
