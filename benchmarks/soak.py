"""Check that memory stays constant while a million rows are predicted, scored, metered and written."""

from __future__ import annotations

import argparse
import json
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
from torch.utils.data import DataLoader, Dataset

import lightning_gradmetrics as lgm
from benchmarks.measure import environment
from lightning_gradmetrics.meters import AURC

__all__ = ["main", "resident"]

SCORES = ("max_softmax", "entropy", "energy", "gradnorm", "gradtrust")
SETTLED = 1000
"""Number of batches after which memory must be constant."""


class _Generated(Dataset[Any]):
    """Samples that are generated from their index, so the data take no memory."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.basis = torch.randn(16, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.rows

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        number = torch.tensor(indices)
        return torch.sin(number[:, None] * self.basis), number % 10


class _Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.network(inputs)
        return logits

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


class _Watch(Callback):
    """Update a meter with every batch, and record the resident memory after every hundredth."""

    def __init__(self) -> None:
        self.meter = AURC(bins=4096)
        self.megabytes: dict[int, float] = {}

    def on_predict_batch_end(self, *arguments: Any, **options: Any) -> None:
        """Update the meter, and record the memory."""
        _, _, logits, (_, labels), number, *_ = arguments
        certainty, prediction = torch.softmax(logits, 1).max(1)
        self.meter.update(1 - certainty, prediction != labels)
        if number % 100 == 0:
            self.megabytes[number] = resident()


def resident() -> float:
    """Return the resident memory of this process in MiB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this benchmark reads /proc/self/status, which only Linux has")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; print and write memory and speed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks soak", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        facts = _soak(options.rows, options.batch_size, directory)
    print(json.dumps(facts, indent=2))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "soak.json").write_text(json.dumps(facts, indent=2) + "\n")


def _soak(rows: int, batch_size: int, directory: str) -> dict[str, Any]:
    watch = _Watch()
    callback = lgm.GradientMetrics(SCORES, output=directory, metrics=())
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[callback, watch],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader = DataLoader(_Generated(rows), batch_size, collate_fn=lambda batch: batch)
    start = time.perf_counter()
    trainer.predict(_Module(), loader, return_predictions=False)
    seconds = time.perf_counter() - start
    settled = [megabytes for number, megabytes in watch.megabytes.items() if number >= SETTLED]
    start = time.perf_counter()
    results = lgm.read_results(directory, columns=["entropy"])
    return {
        **environment("cpu"),
        "rows": results.num_rows,
        "batches": len(loader),
        "rows_per_second": round(rows / seconds),
        f"megabytes_at_{SETTLED}_batches": round(settled[0]),
        "megabytes_at_the_end": round(settled[-1]),
        "largest_megabytes": round(max(settled)),
        "read_seconds": round(time.perf_counter() - start, 2),
        "aurc": float(watch.meter.compute()),
    }
