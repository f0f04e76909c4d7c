"""Figures of layer profiles and of example images, without pyplot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lightning_gradmetrics.pictures.cosine_map_figure import draw_image
from lightning_gradmetrics.results.escaping import literal

__all__ = ["examples_figure", "profile_figure"]

_LABELLED = 40
"""Largest number of layer names on the axis; with more layers, only every second, third, ... is named."""

_INCORRECT, _PLAIN = "#b03a00", "#16181d"
_COLOURS = ("#0067b1", "#c94f00", "#00805c", "#9b3f85", "#a67c00", "#2f97d0", "#16181d")
"""The colours of the report's plots."""


def profile_figure(quartiles: Mapping[str, Tensor], layers: Sequence[str], label: str) -> Figure:
    """Draw one line and one band per dataset over the layers, on a logarithmic scale.

    Args:
        quartiles: Lower quartile, median and upper quartile of every layer, ``(3, L)``, by dataset.
        layers: L names of layers.
        label: Label of the vertical axis.

    Example:
        >>> import torch
        >>> figure = profile_figure({"digits": torch.tensor([[1.0, 2], [3, 4], [5, 6]])}, ["conv", "fc"], "norm")
        >>> [text.get_text() for text in figure.axes[0].get_xticklabels()]
        ['conv', 'fc']
    """
    figure = Figure(figsize=(min(14, 6.5 + 0.16 * len(layers)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    positions = list(range(len(layers)))
    for number, (name, (low, middle, high)) in enumerate(quartiles.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        axes.fill_between(positions, low.tolist(), high.tolist(), color=colour, alpha=0.18, linewidth=0)
        axes.plot(
            positions, middle.tolist(), color=colour, marker="o", markersize=3, linewidth=1.5, label=literal(name)
        )
    if any((values > 0).any() for values in quartiles.values()):
        axes.set_yscale("log", nonpositive="mask")
    step = math.ceil(len(layers) / _LABELLED)
    names = [literal(name) for name in layers[::step]]
    axes.set_xticks(positions[::step], names, rotation=90, fontsize=8)
    axes.set_ylabel(label)
    axes.grid(axis="y", color="0.85", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def examples_figure(
    images: Sequence[Tensor], values: Tensor, index: Tensor, label: Tensor, prediction: Tensor, columns: int = 5
) -> Figure:
    """Draw a grid of images, with index and score above each, and below its label, or the incorrect prediction in red.

    Args:
        images: At least one image ``(1 or 3, H, W)``.
        values: Scores ``(N,)``.
        index: Indices in the dataset ``(N,)``.
        label: True classes ``(N,)``, -1 where unknown.
        prediction: Predicted classes ``(N,)``.
        columns: Number of images per row.

    Example:
        >>> import torch
        >>> one, two = torch.tensor([1]), torch.tensor([2])
        >>> figure = examples_figure([torch.rand(1, 8, 8)], torch.tensor([0.5]), one, one, two)
        >>> figure.axes[0].get_title(), figure.axes[0].get_xlabel()
        ('#1   0.5', 'label 1, predicted 2')
    """
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    tallest = max(image.shape[1] / image.shape[2] for image in images)
    height = 1.4 * min(1.6, tallest)
    figure = Figure(figsize=(1.6 * columns, (height + 0.6) * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(images) :]:
        axes.set_axis_off()
    for number, axes in enumerate(grid[: len(images)]):
        draw_image(axes, images[number])
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_title(f"#{int(index[number])}   {float(values[number]):.3g}", fontsize=9, color=_PLAIN, pad=3)
        words, colour = _outcome(int(label[number]), int(prediction[number]))
        axes.set_xlabel(words, fontsize=9, color=colour, labelpad=2)
    return figure


def _outcome(label: int, prediction: int) -> tuple[str, str]:
    """Return the text below an image and its colour."""
    if label < 0:
        return f"predicted {prediction}", _PLAIN
    if label == prediction:
        return f"label {label}", _PLAIN
    return f"label {label}, predicted {prediction}", _INCORRECT
