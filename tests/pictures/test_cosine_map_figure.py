"""Figures of cosine similarity maps: layout, fixed scale, and no use of pyplot's state."""

from __future__ import annotations

import io

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from lightning_gradmetrics.gradients.cosine_map_summaries import cosine_similarity
from lightning_gradmetrics.pictures.cosine_map_figure import csm_figure
from tests.models import fast_rows


@pytest.fixture
def maps() -> torch.Tensor:
    torch.manual_seed(0)
    return cosine_similarity(torch.randn(5, 4, 6))


def heat_maps(figure):
    return [image for axes in figure.axes for image in axes.images if image.get_cmap().name == "coolwarm"]


def test_every_map_is_drawn_in_order_on_the_fixed_scale(maps):
    drawn = heat_maps(csm_figure(maps, columns=3))
    assert [image.get_clim() for image in drawn] == [(-1.0, 1.0)] * 5
    for image, values in zip(drawn, maps, strict=True):
        assert torch.equal(torch.as_tensor(image.get_array().data), values)


@pytest.mark.parametrize("channels", fast_rows([1, 3], [3]))
def test_images_are_above_their_maps(maps, channels):
    figure = csm_figure(maps, images=torch.randn(5, channels, 8, 8), titles=list("abcde"), columns=3)
    figure.canvas.draw()
    titles = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(titles) == list("abcde")
    for axes in titles.values():
        below = [a for a in figure.axes if a.images and a.get_position().y0 < axes.get_position().y0]
        nearest = min(below, key=lambda a: abs(a.get_position().x0 - axes.get_position().x0) - a.get_position().y0)
        assert nearest.images[0].get_cmap().name == "coolwarm"


def test_class_names_are_the_ticks(maps):
    figure = csm_figure(maps[:1], class_names=["ant", "bee", "c$", "dog"])
    axes = heat_maps(figure)[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["ant", "bee", r"c\$", "dog"]
    figure.savefig(io.BytesIO(), format="png")


def test_zero_maps_are_hatched_and_nan_can_be_drawn(maps):
    vectors = torch.randn(2, 4, 6)
    vectors[0, 2] = 0
    zero = cosine_similarity(vectors)
    zero[1] = torch.nan
    figure = csm_figure(zero)
    hatched = [len([p for p in image.axes.patches if p.get_hatch()]) for image in heat_maps(figure)]
    assert hatched == [2, 0]
    figure.savefig(io.BytesIO(), format="png")


def test_many_classes_and_half_precision():
    csm_figure(torch.eye(100, dtype=torch.bfloat16).expand(2, 100, 100)).savefig(io.BytesIO(), format="svg")


def test_wrong_arguments_are_refused(maps):
    with pytest.raises(ValueError, match="one or more maps"):
        csm_figure(maps[:0])
    with pytest.raises(ValueError, match="3 titles"):
        csm_figure(maps, titles=["a", "b", "c"])
    with pytest.raises(ValueError, match="2 class_names"):
        csm_figure(maps, class_names=["a", "b"])
    with pytest.raises(ValueError, match="columns=0"):
        csm_figure(maps, columns=0)


def test_no_open_pyplot_figure_and_no_changed_settings(maps):
    settings, figures = dict(matplotlib.rcParams), plt.get_fignums()
    csm_figure(maps).canvas.draw()
    assert dict(matplotlib.rcParams) == settings
    assert plt.get_fignums() == figures
