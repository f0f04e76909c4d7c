"""Published values of a trained segmentation model; skipped without the data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import lightning_gradmetrics as lgm
from lightning_gradmetrics.cli.data.label_folders import LabelledImages
from lightning_gradmetrics.cli.models.classifier import Classifier
from lightning_gradmetrics.cli.segmentation import score_segmentation

ROOT = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[3] / "shared" / "data")) / "camvid"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ROOT / "espnet.py").is_file(), reason="needs the trained segmentation model and its images"
    ),
]


@pytest.fixture(scope="module")
def model() -> Iterator[nn.Module]:
    sys.path.append(str(ROOT))
    import espnet

    yield espnet.load()
    sys.path.remove(str(ROOT))
    sys.modules.pop("espnet")


def even_images() -> LabelledImages:
    return LabelledImages(ROOT / "images", ROOT / "labels", "bgr", 255, rows="even")


SCORES = {
    "max_softmax": "max_softmax",
    "entropy": "entropy",
    "margin": "margin",
    "energy": "energy",
    "gradnorm": "gradnorm",
    "pseudo l1": "pseudo_label",
    "pseudo l2": "pseudo_label(statistic=l2)",
    "pseudo linf": "pseudo_label(statistic=linf)",
    "exgrad l1": "exgrad",
    "exgrad l2": "exgrad(p=2)",
    "fisher": "fisher_trace",
    "feature_norm": "feature_norm",
    "PGN oh": "pgn(label=one_hot)",
    "PGN uni": "pgn",
}
PIXELS = """
0001TP_008550 100 200 0 0 0.00418468 0.0350211 -0.994808 -7.82161 -34.1804 0.156753 0.0321276 0.0177769 0.31273 0.0736624 0.415951 -18.7294 6.16367 231.997
0001TP_008550 300 50 4 4 0.000673954 0.00671978 -0.999063 -10.1699 -52.6049 0.0387048 0.008289 0.00392304 0.077377 0.0187885 0.163815 -28.7147 1.23327 280.127
0001TP_008550 177 263 0 5 0.506806 0.912206 -0.0343411 -5.67821 -27.7428 17.9024 4.84164 2.78735 19.263 5.17075 27.2977 -17.662 242.712 564.006
0001TP_009150 20 400 5 5 0.0216666 0.124316 -0.961752 -7.83262 -40.5422 0.981464 0.233817 0.114825 1.92892 0.485693 3.10058 -22.6492 20.6103 338.92
0001TP_009150 123 461 8 1 0.0344819 0.18372 -0.939541 -7.07545 -33.5039 1.30957 0.319132 0.182124 2.54773 0.65728 3.63384 -18.9892 29.8429 324.263
0001TP_009750 251 333 4 4 0.130073 0.539306 -0.794136 -5.94015 -39.341 6.50552 1.36496 0.544345 11.8108 2.66164 18.3337 -25.0072 165.332 711.887
0001TP_010350 61 191 0 5 0.0751874 0.30838 -0.86113 -7.51294 -38.5165 3.4415 0.837783 0.377799 6.43458 1.61642 10.0714 -22.8862 51.6692 438.847
"""  # noqa: E501


def test_single_pixels(model: nn.Module) -> None:
    data, maps = even_images(), {}
    places = {pair[0].stem: number for number, pair in enumerate(data.pairs)}
    model.double()
    try:
        for line in PIXELS.strip().splitlines():
            name, y, x, label, predicted, *values = line.split()
            if name not in maps:
                pixels, labels = data[places[name]]
                maps[name] = lgm.score(model, pixels[None].double(), SCORES), model(pixels[None].double()), labels
            found, logits, labels = maps[name]
            at = int(y), int(x)
            assert (labels[at], logits[0, :, at[0], at[1]].argmax()) == (int(label), int(predicted))
            for score, value in zip(SCORES, values, strict=True):
                assert float(found[score][0][at]) == pytest.approx(float(value), rel=1e-5), (line, score)
    finally:
        model.float()


AGGREGATES = {
    "max_softmax": (86.566, 4.004, 49.73, 87.409, 81.610),
    "entropy": (86.551, 4.046, 50.74, 87.411, 81.052),
    "margin": (86.545, 3.941, 48.57, 87.367, None),
    "energy": (81.704, 5.909, 77.64, None, None),
    "max_logit": (82.602, 5.722, 77.07, None, None),
    "gen": (84.006, 5.099, 69.75, None, None),
    "gradtrust": (85.381, 3.770, 44.86, None, None),
    "pgn(label=one_hot)": (86.808, None, None, None, None),
    "feature_norm": (38.387, None, None, None, None),
    "feature_norm(p=2)": (33.885, None, None, None, None),
    "pseudo_label(statistic=l2)": (87.169, 3.614, 44.18, 87.989, 81.987),
    "pseudo_label(statistic=linf)": (87.065, 3.629, 43.15, None, None),
    "exgrad(p=2)": (87.192, 3.627, 44.34, None, None),
    "pseudo_label": (87.235, 3.641, 45.26, 88.065, 81.936),
    "exgrad": (87.318, 3.629, 45.24, 88.153, 81.875),
    "fisher_trace": (87.584, 3.368, 40.87, 88.407, 81.720),
    "pgn": (88.309, 3.114, 40.05, 88.904, 80.634),
    "gradnorm": (59.993, 12.915, 95.68, 60.769, None),
}
"""AUROC, AURC and FPR95 of all pixels, AUROC in the mean over images, and within the predicted class."""

THIRTY_SEVENTH = {"max_softmax": 86.328, "entropy": 86.300, "margin": 86.317, "energy": 81.431, "max_logit": 82.343}
THIRTY_SEVENTH |= {"gen": 83.761, "gradnorm": 59.731, "pseudo_label": 87.010, "pseudo_label(statistic=l2)": 86.952}
THIRTY_SEVENTH |= {
    "pseudo_label(statistic=linf)": 86.839,
    "exgrad": 87.092,
    "exgrad(p=2)": 86.975,
    "fisher_trace": 87.382,
}
THIRTY_SEVENTH |= {"gradtrust": 85.237, "pgn(label=one_hot)": 86.561, "pgn": 88.169, "feature_norm": 38.446}
SPEARMAN = {"max_softmax": 0.462, "entropy": 0.406, "pseudo_label": 0.552, "exgrad": 0.552}
SEGMENTS = {
    "max_softmax": (75.98, 77.22),
    "entropy": (76.90, 77.53),
    "energy": (78.98, 77.89),
    "pseudo_label": (74.53, 76.74),
    "exgrad": (74.14, 76.50),
    "fisher_trace": (68.82, 72.63),
    "size": (68.09, 69.01),
}
IMAGES = {
    "error": (0.074499, 0.182154),
    "miou": (0.711764, 0.536197),
    "max_softmax": (0.0693622, 0.0889129),
    "entropy": (0.21231, 0.263724),
    "pseudo_label": (3.04126, 3.89572),
    "exgrad": (4.42865, 5.64213),
    "fisher_trace": (6.9967, 8.83105),
    "gradnorm": (-37.6958, -39.0709),
}


def test_even_images(model: nn.Module) -> None:
    exact = {"ignore_index": 11, "every": 1, "bins": None, "resamples": 0}
    callback = score_segmentation(Classifier(model), even_images(), list(AGGREGATES), exact)
    results, segments = callback.results, callback.segments.to_pylist()
    assert sum(results["pixels"].to_pylist()) == 2_002_006
    wrong = sum(
        count * error for count, error in zip(results["pixels"].to_pylist(), results["error"].to_pylist(), strict=True)
    )
    assert wrong == pytest.approx(292_413, abs=10)
    for column, values in IMAGES.items():
        assert [results[column][0].as_py(), results[column][1].as_py()] == pytest.approx(values, rel=1e-4), column
    rows = {}
    for row in callback.pixel_metrics.to_pylist():
        rows[row["score"], row["unit"], row["task"], row["metric"], row["within"]] = row["value"]
    keys = (("auroc", "all"), ("aurc", "all"), ("fpr95", "all"), ("auroc", "image"), ("auroc", "predicted class"))
    for score, values in AGGREGATES.items():
        for key, value in zip(keys, values, strict=True):
            found = 100 * rows[(score, "pixel", "misclassification", *key)]
            assert value is None or found == pytest.approx(value, abs=0.01 if key[0] == "fpr95" else 2e-3), (score, key)
    for score, value in SPEARMAN.items():
        assert rows[score, "image", "error", "spearman", "all"] == pytest.approx(value, abs=1e-3)
    assert len(segments) == 514 and sum(row["iou"] == 0 for row in segments) == 221
    assert sum(row["error"] > 0.5 for row in segments) == 257
    for score, values in SEGMENTS.items():
        found = [100 * rows[score, "segment", task, "auroc", "all"] for task in ("iou = 0", "error > 0.5")]
        assert found == pytest.approx(values, abs=0.02), score
    sampled = score_segmentation(
        Classifier(model), even_images(), list(THIRTY_SEVENTH), {**exact, "every": 37, "segments": 0}
    )
    for row in sampled.pixel_metrics.to_pylist():
        if (row["unit"], row["metric"], row["within"]) == ("pixel", "auroc", "all"):
            assert 100 * row["value"] == pytest.approx(THIRTY_SEVENTH[row["score"]], abs=2e-3)


def mean_pseudo_label(flat: Tensor) -> Tensor:
    """The mean over an image's pixels of the cross-entropy to the predicted class."""
    logits = flat.unflatten(1, (12, -1))
    return (logits.logsumexp(1) - logits.amax(1)).mean(1)


def mean_uniform(flat: Tensor) -> Tensor:
    """The mean over an image's pixels of the cross-entropy to the uniform distribution."""
    return -flat.unflatten(1, (12, -1)).log_softmax(1).mean((1, 2))


MEAN_LOSSES = {
    0: {"head pseudo l1": 0.54505, "head pseudo l2": 0.0344376, "head uniform l1": 21.4074},
    1: {"head pseudo l1": 0.629632, "head pseudo l2": 0.0410476, "head uniform l1": 21.7831},
}
MEAN_LOSSES[0] |= {"whole pseudo l1": 654.452, "whole pseudo l2": 6.24233, "whole uniform l2": 110.73}
MEAN_LOSSES[1] |= {"whole pseudo l1": 1102.63, "whole pseudo l2": 11.132, "whole uniform l2": 115.752}


@pytest.mark.parametrize("number", MEAN_LOSSES)
def test_gradients_of_the_mean_loss_of_an_image(model: nn.Module, number: int) -> None:
    pixels, _ = even_images()[number]
    options: dict[str, Any] = {"logits": lambda output: output.flatten(1)}
    losses = {"pseudo": mean_pseudo_label, "uniform": mean_uniform}
    parts: dict[str, Any] = {"head": lambda name: name == "classifier.weight", "whole": None}
    for name, value in MEAN_LOSSES[number].items():
        part, loss, norm = name.split()
        found = lgm.gradient_statistics(model, pixels[None], losses[loss], parts[part], **options)
        assert float(found.norm(int(norm[1:]))) == pytest.approx(value, rel=1e-3), name
