"""What GradTrust's repository shows: its demo's block for one image, and its table of AUAC and AUFC."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradmetrics.classifier.forward import call, check_model, preserved
from lightning_gradmetrics.classifier.head import capturing
from lightning_gradmetrics.cli.data.folders import IMAGENET_MEAN, IMAGENET_STD
from lightning_gradmetrics.meters.functional import auac, aufc
from lightning_gradmetrics.scores import resolve
from lightning_gradmetrics.scoring.scorer import Scorer

__all__ = ["demo_block", "demo_values", "read_image", "trust_areas", "trust_table", "write_trust_table"]

Turn = Callable[[float], float]


def _negative(score: float) -> float:
    return -score


def _one_minus(score: float) -> float:
    return 1 - score


LINES: dict[str, tuple[str, Turn]] = {
    "GradTrust": ("gradtrust", _negative),
    "Softmax Confidence": ("max_softmax", _one_minus),
    "Entropy": ("entropy", _negative),
    "Margin": ("margin", _negative),
    "Log-likelihood": ("log_likelihood", _negative),
    "ODIN": ("odin", _one_minus),
    "MC-Dropout": ("mc_dropout", _negative),
    "Purview (Initial layers)": ("purview(part=initial)", _negative),
    "Purview (Final layers)": ("purview(part=final)", _negative),
    "Grad Norm": ("gradnorm_kl", _negative),
}
"""The demo's lines: a score, and how the demo's figure, a confidence, follows from it."""

BRACKETED = ("Softmax Confidence", "Entropy", "Margin", "MC-Dropout")
"""The demo prints these as arrays of one sample."""


def read_image(path: str | Path, size: int = 224) -> Tensor:
    """An image as the demo reads it: stretched to a square by bilinear interpolation, normalised as for ImageNet.

    Args:
        path: The image.
        size: Its width and height afterwards.

    Returns:
        ``(1, 3, size, size)``.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no image {str(path)!r}: give the path of a picture, as in image=bird.jpg")
    with Image.open(file) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
    pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def demo_values(model: nn.Module, image: Tensor) -> tuple[int, dict[str, float]]:
    """The prediction for one image, and the demo's figures with the demo's signs: higher = more trust.

    Args:
        model: A classifier in eval mode.
        image: ``(1, ...)``.
    """
    scorer = Scorer(resolve({line: score for line, (score, _) in LINES.items()}))
    check_model(model)
    with preserved(model), capturing(scorer.capture(model)) as capture, torch.no_grad():
        call(model, image)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no dropout module")  # the block's notes say it
        evidence = scorer.evidence(capture, model, image, None)
    figures = {score.name: LINES[score.name][1](score(evidence).item()) + 0.0 for score in scorer.scores}
    return int(evidence.given_logits.argmax(1)), figures


def demo_block(model: nn.Module, image: Tensor, notes: Sequence[str] = ()) -> str:
    """The demo's block: prediction, GradTrust and its comparison metrics, higher = more trust; then notes.

    Args:
        model: A classifier in eval mode.
        image: ``(1, ...)``.
        notes: Further lines below.
    """
    prediction, figures = demo_values(model, image)
    shown = {line: f"[{value:.7g}]" if line in BRACKETED else f"{value:.7g}" for line, value in figures.items()}
    first = f"The prediction is : [{prediction}] with GradTrust: {shown.pop('GradTrust')}"
    drops = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
    missing = [] if drops else ["The model has no dropout module with p > 0: MC-Dropout equals the entropy."]
    lines = [first, "Comparison Metrics:", *(f"{line}: {value}" for line, value in shown.items()), *missing, *notes]
    return "\n".join(lines)


MODES = ("coverage", "threshold")
CAPTION = (
    "Areas under the accuracy (AUAC) and the F1 curve (AUFC) of the accepted samples, times 100, higher is better. Over "
    "coverage, only the order of the scores counts. Over a threshold between the smallest and the largest score, the "
    "score's scale is rewarded too: a rescaling that keeps the order changes the area. The paper does not say which it "
    "took."
)


def trust_areas(results: pa.Table, scores: Sequence[str]) -> list[dict[str, Any]]:
    """AUAC and AUFC of every labelled data set and score, over coverage and over a threshold.

    Args:
        results: A run's per-sample results.
        scores: Names of its score columns.

    Returns:
        A record a data set and score: ``dataset``, ``score``, ``<auac or aufc>_<mode>``; NaN where all scores are
        equal.
    """
    known = results.filter(pc.and_(results["finite"], pc.is_valid(results["label"])))
    records = []
    for name in pc.unique(known["dataset"]).to_pylist():
        rows = known.filter(pc.equal(known["dataset"], name))
        wrong = torch.from_numpy(pc.not_equal(rows["prediction"], rows["label"]).to_numpy().astype(np.int64))
        for score in scores:
            values = torch.from_numpy(rows[score].to_numpy().astype(np.float64))
            records.append({"dataset": name, "score": score, **_areas(values, wrong)})
    return records


def _areas(values: Tensor, wrong: Tensor) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*needs at least two distinct scores")
        return {
            f"{metric.__name__}_{mode}": float(metric(values, wrong, mode))  # type: ignore[arg-type]
            for mode in MODES
            for metric in (auac, aufc)
        }


def trust_table(records: Sequence[dict[str, Any]]) -> Table:
    """The quantitative table for the terminal.

    Args:
        records: Of :func:`trust_areas`.
    """
    table = Table(title="Trust: AUAC and AUFC times 100", title_justify="left", caption=CAPTION, caption_justify="left")
    table.box, table.pad_edge = box.SIMPLE_HEAD, False
    several = len({record["dataset"] for record in records}) > 1
    keys = [f"{metric}_{mode}" for mode in MODES for metric in ("auac", "aufc")]
    table.add_column("score", no_wrap=True)
    for key in keys:
        metric, _, mode = key.partition("_")
        table.add_column(f"{mode}\n{metric.upper()}", justify="right", no_wrap=True)
    for record in records:
        name = f"{record['dataset']}: {record['score']}" if several else record["score"]
        table.add_row(name, *("–" if np.isnan(record[key]) else f"{100 * record[key]:.2f}" for key in keys))
    return table


def write_trust_table(records: Sequence[dict[str, Any]], path: Path) -> None:
    """The records as a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]) if records else ["dataset", "score"])
        writer.writeheader()
        writer.writerows(records)
