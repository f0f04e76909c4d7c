"""The experiment on a segmentation model: evaluates scores on wrong pixels, images and segments."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from lightning_gradmetrics.callback import GradientMetrics
from lightning_gradmetrics.cli.data.label_folders import LabelledImages
from lightning_gradmetrics.cli.progress import trainer_progress

__all__ = ["find_code", "score_segmentation", "show_segmentation"]

Key = tuple[str, str, str, str]
"""Unit, task, metric and pooling of each column."""

PIXELS: dict[str, Key] = {
    "AUROC": ("pixel", "misclassification", "auroc", "all"),
    "AUPR": ("pixel", "misclassification", "aupr", "all"),
    "FPR95": ("pixel", "misclassification", "fpr95", "all"),
    "AURC": ("pixel", "misclassification", "aurc", "all"),
    "mean over images": ("pixel", "misclassification", "auroc", "image"),
    "within class": ("pixel", "misclassification", "auroc", "predicted class"),
}
WIDTH = 180
"""Width of the output in characters if it is not a terminal."""

OTHERS: dict[str, Key] = {
    "image: Spearman with error": ("image", "error", "spearman", "all"),
    "with 1 - mIoU": ("image", "1 - miou", "spearman", "all"),
    "segment: AUROC of IoU = 0": ("segment", "iou = 0", "auroc", "all"),
    "of error > 50 %": ("segment", "error > 0.5", "auroc", "all"),
}


def find_code(folder: str | None) -> None:
    """Append a folder to the import path, so that ``model._target_`` can name a file in it.

    Args:
        folder: The folder; ``None`` does nothing.

    Raises:
        FileNotFoundError: If the folder is missing.
    """
    if folder is None:
        return
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {folder!r}: code= is the folder with the file named in model._target_")
    if str(path) not in sys.path:
        sys.path.append(str(path))


def score_segmentation(
    model: LightningModule,
    data: LabelledImages,
    scores: Sequence[str],
    pixels: Mapping[str, Any],
    batch_size: int = 1,
    name: str = "images",
) -> GradientMetrics:
    """Score labelled images and return the callback.

    Args:
        model: A module whose ``test_step`` calls a segmentation model with the images.
        data: The images.
        scores: The scores; differences are computed to the first one.
        pixels: The arguments of :class:`~lightning_gradmetrics.Pixels`.
        batch_size: Images in one forward pass.
        name: The name of the dataset.
    """
    callback = GradientMetrics(list(scores), datasets={name: "id"}, pixels=pixels, print_summary=False)
    progress = trainer_progress()
    callbacks = [callback, *progress.pop("callbacks")]
    trainer = Trainer(
        callbacks=callbacks, logger=False, enable_checkpointing=False, enable_model_summary=False, **progress
    )
    trainer.test(model, DataLoader(data, batch_size=batch_size), verbose=False)
    return callback


def show_segmentation(results: pa.Table, metrics: pa.Table, segments: int) -> None:
    """Print the number of pixels and segments, and two tables: of pixels, and of images and segments.

    Args:
        results: One row per image.
        metrics: The table ``callback.pixel_metrics``.
        segments: The number of predicted segments.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    labelled = sum(results["pixels"].to_pylist())
    wrong = 0.0
    for count, error in zip(results["pixels"].to_pylist(), results["error"].to_pylist(), strict=True):
        wrong += count * error if count else 0
    console.print(
        f"{results.num_rows} images, {labelled:,} labelled pixels, {round(wrong):,} wrong ({100 * wrong / labelled:.2f} %), "
        f"{segments:,} segments"
    )
    rows = metrics.to_pylist()
    console.print(_table("Wrong pixels, x 100; differences to the first score, 95 % over images", PIXELS, rows))
    console.print(_table("Images and segments; AUROC x 100", OTHERS, rows))


def _table(title: str, columns: Mapping[str, Key], rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=title)
    table.add_column("score", no_wrap=True)
    rows_of_score: dict[str, dict[Key, Mapping[str, Any]]] = {}
    for row in rows:
        key = (row["unit"], row["task"], row["metric"], row["within"])
        if key in columns.values():
            rows_of_score.setdefault(row["score"], {})[key] = row
    for heading in columns:
        table.add_column(heading, justify="right")
    first = next(iter(rows_of_score), None)
    for score, by_key in rows_of_score.items():
        table.add_row(score, *[_cell(by_key.get(key), score == first) for key in columns.values()])
    return table


def _cell(row: Mapping[str, Any] | None, is_first: bool) -> str:
    """Return the value: of the first score with its interval, of the others with the interval of the difference."""
    if row is None:
        return "–"
    is_correlation = row["metric"] == "spearman"
    factor = 1 if is_correlation else 100
    text = f"{factor * row['value']:.3f}"
    if row["metric"] not in ("auroc", "spearman") or row["low"] != row["low"]:
        return text
    if is_first:
        return f"{text} [{factor * row['low']:.2f}, {factor * row['high']:.2f}]"
    return f"{text} ({factor * row['difference_low']:+.2f}, {factor * row['difference_high']:+.2f})"
