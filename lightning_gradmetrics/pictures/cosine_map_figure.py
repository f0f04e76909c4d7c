"""Figures of cosine similarity maps as in the paper: heat maps on a scale from -1 to 1, without pyplot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from lightning_gradmetrics.gradients.cosine_map_summaries import zero_saliency
from lightning_gradmetrics.pictures.plot.style import TITLE_HEIGHT
from lightning_gradmetrics.results.escaping import literal

__all__ = ["csm_figure", "draw_image"]

_SIZE = 1.9
"""Width of a map with its margin, in inches."""

_MARGINS = {"left": 0.3, "right": 0.8, "top": 0.3, "bottom": 0.3}
"""Margins around all maps, in inches; the scale is in the right one."""

_BETWEEN = (0.12, 0.3)
"""Horizontal and vertical distance between axes, in inches."""

_LABELLED = 12
"""Up to this number of classes, each has a tick; above, matplotlib chooses the ticks."""


def csm_figure(
    csm: Tensor,
    *,
    images: Tensor | None = None,
    titles: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    columns: int = 6,
) -> Figure:
    """Draw the maps of samples in a grid, each below its image if given.

    A class without a saliency map is hatched; NaN is grey.

    Args:
        csm: Maps ``(N, K, K)``, N at least 1.
        images: Images ``(N, 1 or 3, H, W)`` or ``None``; each is stretched to its range of values.
        titles: One title per sample.
        class_names: K names for the ticks; numbers by default. For maps of ``classes=k``, the ticks are ranks.
        columns: Number of samples per row of the grid.

    Returns:
        A figure with an Agg canvas, for ``savefig`` or a logger's ``add_figure``.

    Raises:
        ValueError: If there is no map, the number of images, titles or names does not match, or ``columns`` is below 1.

    Example:
        >>> import torch
        >>> figure = csm_figure(torch.eye(3).expand(4, 3, 3), titles=["a", "b", "c", "d"], columns=2)
        >>> [axes.get_title() for axes in figure.axes if axes.get_title()]
        ['a', 'b', 'c', 'd']

    Reference:
        L. Schwinn et al., "Identifying Untrustworthy Predictions in Neural Networks by Geometric Gradient Analysis",
        UAI 2021, figure 1.
    """
    _check_counts(csm, columns, images=images, titles=titles, class_names=class_names)
    columns = min(columns, len(csm))
    rows = math.ceil(len(csm) / columns)
    axes_per_sample = 1 if images is None else 2
    row_height = 2.1 if images is None else 3.7
    # Fixed margins, because a computed layout takes as long as drawing; names of classes have any length.
    layout: Literal["constrained"] | None = "constrained" if class_names is not None else None
    figure = Figure(figsize=(_SIZE * columns + 0.8, row_height * rows + 0.3), layout=layout)
    FigureCanvasAgg(figure)
    shape = (rows * axes_per_sample, columns)
    grid = figure.subplots(*shape, squeeze=False, gridspec_kw=None if layout else _margins(figure, *shape))
    for axes in grid.flat:
        axes.set_axis_off()
    for index, values in enumerate(csm.detach().float().cpu()):
        row, column = divmod(index, columns)
        if images is not None:
            draw_image(grid[row * axes_per_sample, column], images[index])
        heat_map = _draw_map(grid[(row + 1) * axes_per_sample - 1, column], values, class_names, first=column == 0)
        if titles is not None:
            grid[row * axes_per_sample, column].set_title(literal(titles[index]), fontsize=9, y=TITLE_HEIGHT)
    _draw_scale(figure, heat_map, list(grid.flat), is_fixed=layout is None)
    return figure


def _margins(figure: Figure, rows: int, columns: int) -> dict[str, float]:
    """Return the margins of a grid of axes, as fractions of the figure and of the axes."""
    width, height = figure.get_size_inches()
    beside, below = _BETWEEN
    across = (width - _MARGINS["left"] - _MARGINS["right"] + beside) / columns - beside
    down = (height - _MARGINS["top"] - _MARGINS["bottom"] + below) / rows - below
    return {
        "left": _MARGINS["left"] / width,
        "right": 1 - _MARGINS["right"] / width,
        "bottom": _MARGINS["bottom"] / height,
        "top": 1 - _MARGINS["top"] / height,
        "wspace": beside / across,
        "hspace": below / down,
    }


def _check_counts(
    csm: Tensor,
    columns: int,
    *,
    images: Tensor | None,
    titles: Sequence[str] | None,
    class_names: Sequence[str] | None,
) -> None:
    if csm.ndim != 3 or csm.shape[1] != csm.shape[2] or len(csm) == 0:
        raise ValueError(f"expected one or more maps (N, K, K), not shape {tuple(csm.shape)}")
    if columns < 1:
        raise ValueError(f"columns={columns}; expected 1 or more")
    for name, given, wanted in (
        ("images", images, len(csm)),
        ("titles", titles, len(csm)),
        ("class_names", class_names, csm.shape[1]),
    ):
        if given is not None and len(given) != wanted:
            raise ValueError(f"{len(given)} {name} for maps of shape {tuple(csm.shape)}; expected {wanted}")


def _draw_map(axes: Axes, values: Tensor, class_names: Sequence[str] | None, first: bool) -> AxesImage:
    """Draw one heat map. The first map of a row has ticks with the classes; more ticks would take longer than all maps."""
    size = len(values)
    axes.set_axis_on()
    axes.set_facecolor("0.8")
    heat_map = axes.imshow(values.numpy(), cmap="coolwarm", vmin=-1, vmax=1, interpolation="nearest")
    without_saliency = zero_saliency(values[None])[0].nonzero().flatten()
    for index in without_saliency.tolist():
        axes.axhspan(index - 0.5, index + 0.5, fill=False, hatch="////", edgecolor="0.6", linewidth=0)
        axes.axvspan(index - 0.5, index + 0.5, fill=False, hatch="////", edgecolor="0.6", linewidth=0)
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
    axes.tick_params(labelsize=6, length=2)
    if not first:
        axes.set(xticks=[], yticks=[])
    elif class_names is not None:
        names = [literal(name) for name in class_names]
        axes.set_xticks(range(size), names, rotation=90)
        axes.set_yticks(range(size), names)
    elif size <= _LABELLED:
        axes.set_xticks(range(size))
        axes.set_yticks(range(size))
    return heat_map


def draw_image(axes: Axes, image: Tensor) -> None:
    """Draw an image stretched to its range of values; an image with one channel is grey."""
    pixels = image.detach().float().cpu().nan_to_num()
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-12)
    if len(pixels) == 1:
        axes.imshow(pixels[0].numpy(), cmap="gray", vmin=0, vmax=1)
    else:
        axes.imshow(pixels.permute(1, 2, 0).numpy())


def _draw_scale(figure: Figure, heat_map: AxesImage, axes: list[Axes], is_fixed: bool) -> None:
    """Draw the colour scale to the right of the axes, in the margin if the margins are fixed."""
    ticks = [-1, -0.5, 0, 0.5, 1]
    if is_fixed:
        width, height = figure.get_size_inches()
        low, high = _MARGINS["bottom"] / height, 1 - _MARGINS["top"] / height
        place = figure.add_axes((1 - 0.65 / width, low, 0.12 / width, high - low))
        bar = figure.colorbar(heat_map, cax=place, ticks=ticks)
    else:
        bar = figure.colorbar(heat_map, ax=axes, ticks=ticks, fraction=0.04, pad=0.02)
    bar.set_label("cosine similarity", fontsize=8)
    bar.ax.tick_params(labelsize=7)
