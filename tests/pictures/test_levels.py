"""Metrics of images and segments, and intervals over images, against slow definitions."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lightning_gradmetrics.pictures.pixels.levels import (
    image_metrics,
    labelled_pixels,
    pixel_metrics,
    real_valued_aurc,
    segment_metrics,
)
from lightning_gradmetrics.pictures.pixels.metrics import PixelMeter, joined
from lightning_gradmetrics.pictures.pixels.resampling import GROUPS, group_of, weights_of_groups

RESAMPLES = 60
Image = tuple[Tensor, Tensor, Tensor]


def images(count: int, size: int = 300) -> list[Image]:
    """Scores, targets and predicted classes, with more and clearer errors in some images."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(count):
        target = torch.rand(size, generator=generator) < 0.1 + 0.1 * (number % 4)
        scores = torch.randn(size, generator=generator) + target * (0.5 + 0.2 * (number % 3))
        rows.append((scores, target, torch.randint(3, (size,), generator=generator)))
    return rows


def measured(rows: dict[int, Image], bins: int | None = None) -> PixelMeter:
    meter = PixelMeter(bins, RESAMPLES)
    for number, image in rows.items():
        meter.add(*image, group_of(number, image[2]))
    return meter


def area_of(rows: list[Image], weights: Tensor, classes: tuple[int, ...] | None = None) -> float:
    """Return the AUROC with each image counted as often as it was drawn; within classes, the mean weighted by pairs."""
    scores, target, predicted = (torch.cat([row[part] for row in rows]) for part in range(3))
    weight = torch.cat([torch.full((len(row[0]),), float(one)) for row, one in zip(rows, weights, strict=True)])
    order = scores.argsort()
    target, predicted, weight = target[order], predicted[order], weight[order].double()
    total = pairs = 0.0
    for number in classes or (None,):
        use = weight * (1 if number is None else (predicted == number))
        positive, negative = use * target, use * ~target
        total += float((positive * negative.cumsum(0)).sum())
        pairs += float(positive.sum() * negative.sum())
    return total / pairs


def test_intervals_are_those_of_drawn_images() -> None:
    rows = images(GROUPS)
    found = measured(dict(enumerate(rows))).estimates()
    for key, classes in ((("auroc", "all"), None), (("auroc", "predicted class"), (0, 1, 2))):
        drawn = [area_of(rows, weights, classes) for weights in weights_of_groups(RESAMPLES)]
        assert found[key].interval() == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=1e-3)
        low, high = found[key].interval()
        assert low < found[key].value < high
    per_image = torch.tensor([roc_auc_score(row[1], row[0]) for row in rows], dtype=torch.float64)
    weights = weights_of_groups(RESAMPLES)
    drawn = (weights @ per_image) / weights.sum(1)
    assert found["auroc", "image"].interval() == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=1e-9)


def few_errors(rows: dict[int, Image], errors: int) -> dict[int, Image]:
    """The images with this number of wrong pixels, at most one in each."""
    changed = {}
    for number, (scores, _, predicted) in rows.items():
        target = torch.zeros(len(scores), dtype=torch.bool)
        target[0] = number < errors
        changed[number] = (scores, target, predicted)
    return changed


@pytest.mark.parametrize(("count", "errors", "expected"), [(20, 9, False), (20, 10, True), (9, 9, False)])
def test_no_intervals_with_fewer_than_ten_errors_or_images(count: int, errors: int, expected: bool) -> None:
    found = measured(few_errors(dict(enumerate(images(count))), errors)).estimates()
    assert found["auroc", "all"].value == found["auroc", "all"].value
    for key in (("auroc", "all"), ("auroc", "image"), ("auroc", "predicted class")):
        assert (found[key].interval()[0] == found[key].interval()[0]) is expected, key


@pytest.mark.parametrize("count", [9, 10])
def test_no_intervals_with_fewer_than_ten_images_or_segments(count: int) -> None:
    rows = []
    for index in range(2 * count):
        image = {"dataset": "a", "index": index, "size": 10, "score": float(index % 7)}
        rows.append({**image, "error": index % 2, "miou": index / 30, "iou": 1 - index % 2})
    table = pa.Table.from_pylist(rows)
    of_images = image_metrics(table.slice(0, count), ["score"], 50)
    of_segments = segment_metrics(table.select, ["score"], 50)
    for row in [*of_images, *of_segments]:
        if row["metric"] != "aurc":
            assert (row["low"] == row["low"]) is (count == 10), row


@pytest.mark.parametrize("bins", [None, 16384])
def test_processes_together_have_the_metrics_of_one(bins: int | None) -> None:
    """Merge the images of two processes whose first images are very different."""
    rows = dict(enumerate(images(24)))
    rows[1] = (rows[1][0] + 3, *rows[1][1:])
    one = measured(rows, bins).estimates()
    halves = [measured({number: rows[number] for number in range(start, 24, 2)}, bins) for start in (0, 1)]
    both = joined([{("set", "misclassification", "score"): half} for half in halves])
    (meter,) = both.values()
    for key, found in meter.estimates().items():
        assert found.value == pytest.approx(one[key].value, abs=1e-6), key
        if key[0] == "auroc":
            assert found.interval() == pytest.approx(one[key].interval(), abs=6e-3), key


def test_differences_are_paired() -> None:
    """A score that is better in every image by the same amount has a narrow interval of its difference."""
    rows = dict(enumerate(images(20)))
    better = {number: (image[0] + 0.2 * image[1], *image[1:]) for number, image in rows.items()}
    meters = {("set", "misclassification", "a"): measured(rows), ("set", "misclassification", "b"): measured(better)}
    found = {(row["score"], row["metric"], row["within"]): row for row in pixel_metrics(meters)}
    first, second = found["a", "auroc", "all"], found["b", "auroc", "all"]
    assert first["difference"] == 0 and second["difference"] == second["value"] - first["value"]
    assert 0 < second["difference_low"] < second["difference"] < second["difference_high"]
    assert second["difference_high"] - second["difference_low"] < (second["high"] - second["low"]) / 2


def test_metrics_of_images() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for index in range(30):
        error = rng.random()
        rows.append(
            {"dataset": "a", "index": index, "error": error, "miou": rng.random(), "score": error + rng.random()}
        )
    rows.append({"dataset": "a", "index": 30, "error": float("nan"), "miou": float("nan"), "score": 1.0})
    found = {(row["task"], row["metric"]): row for row in image_metrics(pa.Table.from_pylist(rows), ["score"], 200)}
    scores, errors = np.array([row["score"] for row in rows[:30]]), np.array([row["error"] for row in rows[:30]])
    correlation = found["error", "spearman"]
    assert correlation["value"] == pytest.approx(spearmanr(scores, errors).statistic)
    assert correlation["low"] < correlation["value"] < correlation["high"]
    ordered = errors[np.argsort(scores)]
    expected = np.mean([ordered[: k + 1].mean() for k in range(30)])
    assert found["error", "aurc"]["value"] == pytest.approx(expected)
    assert ("1 - miou", "spearman") in found


def test_the_order_of_tied_images_does_not_matter() -> None:
    risks = torch.tensor([0.0, 1.0, 0.5])
    assert real_valued_aurc(torch.zeros(3), risks) == pytest.approx(0.5)
    assert real_valued_aurc(torch.zeros(3), risks.flip(0)) == pytest.approx(0.5)


def test_metrics_of_segments() -> None:
    rng = np.random.default_rng(1)
    rows = []
    for number in range(200):
        iou, error = max(0.0, rng.random() - 0.3), rng.random()
        row = {"dataset": "a", "index": number // 10, "size": int(rng.integers(1, 90))}
        rows.append({**row, "iou": iou, "error": error, "score": error + rng.random()})
    table = pa.Table.from_pylist(rows)
    found = {(row["task"], row["score"]): row for row in segment_metrics(table.select, ["score"], 200)}
    for task, target in (("iou = 0", lambda row: row["iou"] == 0), ("error > 0.5", lambda row: row["error"] > 0.5)):
        truth = [target(row) for row in rows]
        one, other = found[task, "score"], found[task, "size"]
        assert one["value"] == pytest.approx(roc_auc_score(truth, [row["score"] for row in rows]))
        assert other["value"] == pytest.approx(roc_auc_score(truth, [-row["size"] for row in rows]))
        assert one["low"] < one["value"] < one["high"] and other["difference"] == other["value"] - one["value"]
    unlabelled = pa.table({**table.to_pydict(), "iou": pa.nulls(200), "error": pa.nulls(200)})
    assert not list(segment_metrics(unlabelled.select, ["score"], 0))


def test_the_accuracy_of_labelled_pixels() -> None:
    images = pa.table({"pixels": [10, 0, 30], "error": [0.5, None, 0.1]})
    pixels, accuracy = labelled_pixels(images)
    assert pixels == 40 and accuracy == pytest.approx(1 - 8 / 40)
