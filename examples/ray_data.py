"""
Ray Data
========

Score Parquet files and image files in worker processes.

Install Ray first: ``pip install 'lightning-gradmetrics[ray]'``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lightning_gradmetrics as lgm

SCORES = ["max_softmax", "gradnorm"]


def make_model() -> nn.Module:
    """Return the model. Each worker calls this once; load trained weights here."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def pixels(batch: Mapping[str, Any]) -> Tensor:
    """Return the model's inputs for a batch of greyscale images ``(N, H, W)``."""
    return torch.from_numpy(np.array(batch["image"])).float() / 255


def write_data(folder: Path) -> None:
    """Write 100 digits as one Parquet file and as PNG files."""
    digits = (load_digits().images[:100] * 15).astype(np.uint8)
    vectors = digits.reshape(100, 64).astype(np.float32) / 255
    table = pa.table({"id": list(range(100)), "vector": list(vectors)})
    pq.write_table(table, folder / "digits.parquet")
    (folder / "images").mkdir()
    for number, digit in enumerate(digits):
        Image.fromarray(digit).save(folder / "images" / f"{number}.png")


def main() -> None:
    """Score the Parquet file and the images; print the three least certain samples of each."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    folder = Path(tempfile.mkdtemp())
    write_data(folder)
    shared = {
        "fn_constructor_args": [make_model, SCORES],
        "batch_size": 32,
        "concurrency": 1,  # on GPUs, add "num_gpus": 1
    }

    vectors = ray.data.read_parquet(str(folder / "digits.parquet"))
    arguments = {"inputs": "vector"}
    scored = vectors.map_batches(
        lgm.ray.Scorer,
        fn_constructor_kwargs=arguments,
        batch_format="pyarrow",
        **shared,
    )
    for row in scored.sort("max_softmax", descending=True).take(3):
        print(row["id"], {name: round(row[name], 4) for name in SCORES})

    images = ray.data.read_images(str(folder / "images"), include_paths=True)
    arguments = {"inputs": pixels, "drop": ["image"]}
    scored = images.map_batches(lgm.ray.Scorer, fn_constructor_kwargs=arguments, **shared)
    for row in scored.sort("max_softmax", descending=True).take(3):
        print(Path(row["path"]).name, {name: round(row[name], 4) for name in SCORES})


if __name__ == "__main__":
    main()
