"""Figures of profiles and of examples, without pyplot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lightning_gradmetrics.pictures.cosine_map_figure import draw_image

__all__ = ["examples_figure", "profile_figure"]

_LABELLED = 40
"""Layers up to which each has its name on the axis; of more, every second, third, ... has."""

_WRONG, _PLAIN = "#b03a00", "#16181d"
_COLOURS = ("#0067b1", "#c94f00", "#00805c", "#9b3f85", "#a67c00", "#2f97d0", "#16181d")
"""Those of the report's own pictures."""


def profile_figure(quartiles: Mapping[str, Tensor], layers: Sequence[str], label: str) -> Figure:
    """A line and a band for each data set over the layers, on a logarithmic scale.

    Args:
        quartiles: Lower quartile, median and upper quartile of every layer, ``(3, L)``, by data set.
        layers: L names.
        label: What they are of.

    Example:
        >>> import torch
        >>> figure = profile_figure({"digits": torch.tensor([[1.0, 2], [3, 4], [5, 6]])}, ["conv", "fc"], "norm")
        >>> [text.get_text() for text in figure.axes[0].get_xticklabels()]
        ['conv', 'fc']
    """
    figure = Figure(figsize=(min(14, 6.5 + 0.16 * len(layers)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = list(range(len(layers)))
    for number, (name, (low, middle, high)) in enumerate(quartiles.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        axes.fill_between(places, low.tolist(), high.tolist(), color=colour, alpha=0.18, linewidth=0)
        axes.plot(places, middle.tolist(), color=colour, marker="o", markersize=3, linewidth=1.5, label=_literal(name))
    if any((values > 0).any() for values in quartiles.values()):
        axes.set_yscale("log", nonpositive="mask")
    step = -(-len(layers) // _LABELLED)
    axes.set_xticks(places[::step], [_literal(name) for name in layers[::step]], rotation=90, fontsize=8)
    axes.set_ylabel(label)
    axes.grid(axis="y", color="0.85", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def examples_figure(
    images: Sequence[Tensor], values: Tensor, index: Tensor, label: Tensor, prediction: Tensor, columns: int = 5
) -> Figure:
    """A grid of images; above each its index and score, below its label and, in red, another prediction.

    Args:
        images: N of them, at least 1, ``(1 or 3, H, W)`` each.
        values: ``(N,)``.
        index: ``(N,)``.
        label: ``(N,)``, -1 where unknown.
        prediction: ``(N,)``.
        columns: Images in a row.

    Example:
        >>> import torch
        >>> one, two = torch.tensor([1]), torch.tensor([2])
        >>> figure = examples_figure([torch.rand(1, 8, 8)], torch.tensor([0.5]), one, one, two)
        >>> figure.axes[0].get_title(), figure.axes[0].get_xlabel()
        ('#1   0.5', 'label 1, predicted 2')
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height = 1.4 * min(1.6, max(image.shape[1] / image.shape[2] for image in images))
    figure = Figure(figsize=(1.6 * columns, (height + 0.6) * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(images) :]:
        axes.set_axis_off()
    for place, axes in enumerate(grid[: len(images)]):
        draw_image(axes, images[place])
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        true, predicted = int(label[place]), int(prediction[place])
        wrong = true >= 0 and true != predicted
        words = (
            f"label {true}, predicted {predicted}"
            if wrong
            else f"label {true}"
            if true >= 0
            else f"predicted {predicted}"
        )
        axes.set_title(f"#{int(index[place])}   {float(values[place]):.3g}", fontsize=9, color=_PLAIN, pad=3)
        axes.set_xlabel(words, fontsize=9, color=_WRONG if wrong else _PLAIN, labelpad=2)
    return figure


def _literal(text: str) -> str:
    """The text with no mathematics in it."""
    return text.replace("$", r"\$")
