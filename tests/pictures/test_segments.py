"""Segments against a slow search, and their IoU against sets of pixels."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_gradmetrics.pictures.pixels.segments import components, segments_of


def reached(values: np.ndarray, start: tuple[int, int]) -> frozenset[tuple[int, int]]:
    """The pixels of equal value that are connected to a pixel, diagonally too."""
    seen, waiting = {start}, [start]
    while waiting:
        y, x = waiting.pop()
        for near in [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
            inside = 0 <= near[0] < values.shape[0] and 0 <= near[1] < values.shape[1]
            if inside and near not in seen and values[near] == values[start]:
                seen.add(near)
                waiting.append(near)
    return frozenset(seen)


@pytest.mark.parametrize("seed", range(5))
def test_segments_are_the_connected_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prediction, labels = rng.integers(3, size=(7, 9)), rng.integers(-1, 3, size=(7, 9))
    maps = {"score": rng.random((7, 9))}
    cut = np.where(labels < 0, -1, prediction)
    expected = {}
    for place in zip(*np.nonzero(cut >= 0), strict=True):
        region = reached(cut, place)
        true = set()
        for pixel in region:
            if labels[pixel] == cut[pixel]:
                true |= reached(labels, pixel)
        wrong = sum(labels[pixel] != cut[pixel] for pixel in region) / len(region)
        mean = np.mean([maps["score"][pixel] for pixel in region])
        expected[min(region)] = (len(region), len(region & true) / len(region | true), wrong, mean)
    found = segments_of(prediction, labels, maps, 1)
    numbers, _ = components(cut)
    assert len(found.columns["segment"]) == len(expected)
    for place, number in enumerate(found.columns["segment"]):
        pixels = np.argwhere(numbers == number)
        values = [found.columns[name][place] for name in ("size", "iou", "error")]
        assert [*values, found.scores["score"][place]] == pytest.approx(expected[tuple(pixels[0])])
        assert found.columns["box"][place].tolist() == [*pixels.min(0), *(pixels.max(0) + 1)]
        assert found.columns["class"][place] == cut[tuple(pixels[0])]
    large = segments_of(prediction, labels, maps, 5).columns["size"]
    assert large.tolist() == [size for size in found.columns["size"] if size >= 5]
