"""Measure memory while ``Trainer.test`` scores many large images: ``python -m benchmarks large_images``.

The images are smooth random fields, generated from their index. The model is one 1x1 convolution, so nearly all time
goes to scores, segments, metrics and the writer. On 27 November 2026, with images of 1,000 x 1,000 pixels, the process
used 1,364 MiB after 250 images, 1,324 after 1,000 and 1,323 after 10,000. That took 76 minutes on one thread of a busy
machine.
"""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import lightning_gradmetrics as lgm
from benchmarks.measure import environment
from benchmarks.soak import resident

__all__ = ["main"]

CLASSES = 2
COARSE = 12
"""Height and width of the random fields before resizing, which determine the number of segments."""


class Fields(Dataset[Any]):
    """Images and labels that are generated from their index, so the data take no memory."""

    def __init__(self, count: int, side: int) -> None:
        self.count, self.side = count, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        coarse = torch.randn(1, CLASSES, COARSE, COARSE, generator=torch.Generator().manual_seed(index))
        image = F.interpolate(coarse, (self.side, self.side), mode="bilinear")[0]
        return image, (image[1] > image[0]).long().roll(self.side // 40, 0)


class Pointwise(LightningModule):
    """A 1x1 convolution with identity weights: the logits are the image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(CLASSES, CLASSES, 1)
        nn.init.eye_(self.head.weight[:, :, 0, 0])
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images)
        return logits

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


class Watch(Callback):
    """Prints the number of images and the resident memory at regular intervals."""

    def __init__(self, every: int) -> None:
        self.every, self.start = every, time.perf_counter()

    def on_test_batch_end(self, *arguments: Any, **options: Any) -> None:
        """Print one line at the chosen batches."""
        images = arguments[4] + 1
        if images % self.every == 0 or images == 10:
            gc.collect()
            print(f"{images:>9,} | {time.perf_counter() - self.start:>8,.0f} | {resident():>8,.0f}", flush=True)


def run(images: int, side: int, scores: Sequence[str], every: int, output: str | None) -> lgm.GradientMetrics:
    """Score the images, and return the callback."""
    settings = lgm.Pixels(segments=50, resamples=200)
    callback = lgm.GradientMetrics(list(scores), pixels=settings, output=output, print_summary=False)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    options |= {"enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(callbacks=[callback, Watch(every)], **options)
    print(f"   images | seconds | resident MiB (at the start {resident():,.0f})")
    trainer.test(Pointwise(), DataLoader(Fields(images, side), 1), verbose=False)
    return callback


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the resident memory during the run, the size of the segments, and the metrics."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks large_images", description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--side", type=int, default=1000, help="height and width")
    parser.add_argument("--scores", default="max_softmax,gradnorm")
    parser.add_argument("--every", type=int, default=500, help="number of images per printed line")
    parser.add_argument("--in-memory", action="store_true", help="keep the results in memory instead of output=")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    facts = environment("cpu")
    print({name: facts[name] for name in ("date", "processor", "threads", "torch", "load")})
    scores, side = options.scores.split(","), options.side
    print(f"{options.images:,} images of {side:,} x {side:,}, {CLASSES} classes, scores: {', '.join(scores)}")
    with tempfile.TemporaryDirectory() as directory:
        output = None if options.in_memory else directory
        callback = run(options.images, side, scores, options.every, output)
        print(f"at the end {resident():,.0f} MiB")
        size = sum(path.stat().st_size for path in Path(directory).glob("*.parquet"))
        segments = callback.segments
        numeric_columns = segments.select([name for name in segments.column_names if name != "class_name"])
        per_segment = numeric_columns.nbytes / max(1, numeric_columns.num_rows)
        print(f"{segments.num_rows:,} segments, {per_segment:.0f} bytes each in memory; {size / 2**20:.1f} MiB on disk")
        for row in callback.pixel_metrics.to_pylist():
            if row["metric"] == "auroc" or row["unit"] == "image":
                print(row["unit"], row["score"], row["task"], row["metric"], row["within"], f"{row['value']:.4f}")
