"""Figures of cosine similarity maps, after the paper's: heat maps on a scale from -1 to 1, without pyplot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from lightning_gradmetrics.gradients.cosine_map_summaries import zero_saliency

__all__ = ["csm_figure", "draw_image", "mean_csm_figure"]

_LABELLED = 12
"""Classes up to which each has its tick; above, matplotlib chooses."""


def csm_figure(
    csm: Tensor,
    *,
    images: Tensor | None = None,
    titles: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    columns: int = 6,
) -> Figure:
    """A grid of samples' maps, each under its image if given. A class without a saliency map is hatched, NaN is grey.

    Args:
        csm: ``(N, K, K)``, N at least 1.
        images: ``(N, 1 or 3, H, W)`` of any scale (each is stretched to its own range), or ``None``.
        titles: A line over each sample, N of them.
        class_names: K names for the ticks; numbers by default. For maps of ``classes=k`` the ticks are ranks.
        columns: Samples in a row of the grid.

    Returns:
        A figure with an Agg canvas, for ``savefig`` or a logger's ``add_figure``.

    Raises:
        ValueError: If there is no map, a count does not fit the maps, or ``columns`` is below 1.

    Example:
        >>> figure = csm_figure(torch.eye(3).expand(4, 3, 3), titles=["a", "b", "c", "d"], columns=2)
        >>> [axes.get_title() for axes in figure.axes if axes.get_title()]
        ['a', 'b', 'c', 'd']

    Reference:
        L. Schwinn et al., "Identifying Untrustworthy Predictions in Neural Networks by Geometric Gradient Analysis",
        UAI 2021, figure 1.
    """
    _check_counts(csm, columns, images=images, titles=titles, class_names=class_names)
    columns = min(columns, len(csm))
    rows = -(-len(csm) // columns)
    per_sample = 1 if images is None else 2
    figure = Figure(figsize=(1.9 * columns + 0.8, (2.1 if images is None else 3.7) * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows * per_sample, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for index, values in enumerate(csm.detach().float().cpu()):
        row, column = divmod(index, columns)
        if images is not None:
            draw_image(grid[row * per_sample, column], images[index])
        picture = _draw_map(grid[(row + 1) * per_sample - 1, column], values, class_names, first=column == 0)
        if titles is not None:
            grid[row * per_sample, column].set_title(titles[index].replace("$", r"\$"), fontsize=9)
    _draw_scale(figure, picture, list(grid.flat))
    return figure


def mean_csm_figure(
    groups: Mapping[str, Tensor], *, class_names: Sequence[str] | None = None, columns: int = 6
) -> Figure:
    """The mean map of each group of samples side by side, with the number of samples in it.

    Args:
        groups: Maps ``(N_g, K, K)`` by the group's name; samples with NaN are left out.
        class_names: As for :func:`csm_figure`.
        columns: As for :func:`csm_figure`.

    Raises:
        ValueError: If there is no group, or a group has no finite map.

    Example:
        >>> figure = mean_csm_figure({"correct": torch.eye(3).expand(4, 3, 3), "wrong": torch.eye(3)[None]})
        >>> [axes.get_title() for axes in figure.axes if axes.get_title()]
        ['correct (4)', 'wrong (1)']
    """
    if not groups:
        raise ValueError("no group of maps to draw; expected {name: (N, K, K)}")
    finite = {name: maps[maps.isfinite().all(2).all(1)] for name, maps in groups.items()}
    empty = [name for name, maps in finite.items() if len(maps) == 0]
    if empty:
        raise ValueError(f"no finite map in the group {', '.join(map(repr, empty))}; leave it out")
    means = torch.stack([maps.float().mean(0).cpu() for maps in finite.values()])
    titles = [f"{name} ({len(maps)})" for name, maps in finite.items()]
    return csm_figure(means, titles=titles, class_names=class_names, columns=columns)


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
    """One heat map; class names at the ticks, on the left of the first of a row only."""
    size = len(values)
    axes.set_axis_on()
    axes.set_facecolor("0.8")
    picture = axes.imshow(values.numpy(), cmap="coolwarm", vmin=-1, vmax=1, interpolation="nearest")
    for index in zero_saliency(values[None])[0].nonzero().flatten().tolist():
        axes.axhspan(index - 0.5, index + 0.5, fill=False, hatch="////", edgecolor="0.6", linewidth=0)
        axes.axvspan(index - 0.5, index + 0.5, fill=False, hatch="////", edgecolor="0.6", linewidth=0)
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
    axes.tick_params(labelsize=6, length=2, labelleft=first)
    if size <= _LABELLED or class_names is not None:
        names = [str(i) for i in range(size)] if class_names is None else [n.replace("$", r"\$") for n in class_names]
        axes.set_xticks(range(size), names, rotation=0 if class_names is None else 90)
        axes.set_yticks(range(size), names)
    return picture


def draw_image(axes: Axes, image: Tensor) -> None:
    """A picture stretched to its own range; grey if it has one channel."""
    pixels = image.detach().float().cpu().nan_to_num()
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-12)
    if len(pixels) == 1:
        axes.imshow(pixels[0].numpy(), cmap="gray", vmin=0, vmax=1)
    else:
        axes.imshow(pixels.permute(1, 2, 0).numpy())


def _draw_scale(figure: Figure, picture: AxesImage, axes: list[Axes]) -> None:
    bar = figure.colorbar(picture, ax=axes, ticks=[-1, -0.5, 0, 0.5, 1], fraction=0.04, pad=0.02)
    bar.set_label("cosine similarity", fontsize=8)
    bar.ax.tick_params(labelsize=7)
