"""Histograms of a score over correct and incorrect predictions, and over each out-of-distribution dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_gradmetrics.evaluation.tasks import KINDS, Rows, rows_of
from lightning_gradmetrics.pictures.plot.style import COLOURS, Plot, new_axes
from lightning_gradmetrics.results.escaping import literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["distributions"]

SHOWN_RANGE = (0.005, 0.995)
"""The quantiles of all values at which the horizontal axis ends; values beyond are counted in the outer bins."""


def distributions(
    results: Any, roles: Mapping[str, str], score: str, *, bins: int = 40, ax: Axes | None = None
) -> Plot:
    """Plot the distribution of a score over each kind of sample; the legend lists the number of samples.

    Args:
        results: A per-sample table, of any kind that :func:`lightning_gradmetrics.evaluation.evaluate` accepts.
        roles: The role of each dataset; ``callback.evaluation.settings["roles"]`` after a run.
        score: The column to plot.
        bins: The number of bins.
        ax: Where to draw; by default on a new pyplot figure.

    Returns:
        The axes, and the histogram of each group by its name: ``"test correct"``, ``"test incorrect"``, ``"svhn"``.

    Raises:
        ValueError: If there is no such column, or it has no finite value.

    Example:
        >>> import pyarrow as pa
        >>> from matplotlib.figure import Figure
        >>> columns = {"dataset": ["test"] * 3, "index": [0, 1, 2], "prediction": [0, 1, 1], "label": [0, 1, 0]}
        >>> table = pa.table({**columns, "entropy": [0.1, 0.3, 0.9]})
        >>> list(distributions(table, {"test": "id"}, "entropy", ax=Figure().subplots()).artists)
        ['test correct', 'test incorrect']
    """
    rows, _ = rows_of(results, [score], roles)
    groups = _groups(rows, score)
    if not groups:
        raise ValueError(f"the score {score!r} has no finite value to plot")
    axes = new_axes(ax)
    low, high = np.quantile(np.concatenate(list(groups.values())), SHOWN_RANGE)
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    artists = {}
    for number, (name, values) in enumerate(groups.items()):
        density, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges, density=True)
        label, colour = f"{literal(name)} ({len(values):,})", COLOURS[number % len(COLOURS)]
        artists[name] = axes.stairs(density, edges, fill=True, alpha=0.35, color=colour, label=label)
        axes.stairs(density, edges, color=colour)
    axes.set(xlabel=literal(score), ylabel="density", xlim=(edges[0], edges[-1]))
    axes.legend(fontsize="small")
    return Plot(axes, artists)


def _groups(rows: Rows, score: str) -> dict[str, NDArray[Any]]:
    """Return the values of each non-empty class of rows."""
    values, codes = rows.scores[score].numpy(), rows.codes.numpy()
    groups = {}
    for code, row_class in enumerate(rows.classes):
        if row_class.rows:
            name = row_class.dataset if row_class.kind == KINDS[-1] else f"{row_class.dataset} {row_class.kind}"
            groups[name] = values[codes == code]
    return groups
