"""Shared parts of all plots: the returned object, colours for colour-blind readers, and new axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "TITLE_HEIGHT", "Plot", "new_axes", "score_styles"]

REFERENCE = "max_softmax"
"""The score drawn in black, the baseline that every paper compares with."""

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's colours, without black and yellow."""

TITLE_HEIGHT = 1.0
"""The height of titles, at the upper end of the axes. By default, matplotlib searches for it each time it draws a figure."""

DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Plot:
    """The axes and artists of a plot, for restyling.

    Args:
        axes: The Matplotlib axes.
        artists: The line of each score, or the histogram of each group, by its name.

    Example:
        >>> from matplotlib.figure import Figure
        >>> axes = Figure().subplots()
        >>> plot = Plot(axes, {"energy": axes.plot([0, 1], [0, 1])[0]})
        >>> plot.artists["energy"].set_linewidth(3)
        >>> plot.figure is axes.figure
        True
    """

    axes: Axes
    artists: Mapping[str, Any]

    @property
    def figure(self) -> Figure:
        """The Matplotlib figure of the axes."""
        return self.axes.figure  # type: ignore[return-value]


def new_axes(axes: Axes | None) -> Axes:
    """Return the given axes, or the axes of a new pyplot figure."""
    if axes is not None:
        return axes
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(4.8, 3.8), layout="constrained")[1]


def score_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the colour and dashes of each score's line; the first 24 are all different."""
    styles: dict[str, dict[str, Any]] = {}
    others = [name for name in names if name != REFERENCE]
    for number, name in enumerate(others):
        dashes = DASHES[(number // len(COLOURS)) % len(DASHES)]
        styles[name] = {"color": COLOURS[number % len(COLOURS)], "linestyle": dashes}
    styles[REFERENCE] = {"color": "black", "linestyle": "-"}
    return styles
