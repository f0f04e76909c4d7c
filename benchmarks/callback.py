"""What the callback adds to ``trainer.predict``: head scores on a ResNet-20, and per batch of a tiny model."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradmetrics as lgm
from benchmarks.measure import environment, interleaved, summary
from benchmarks.models import resnet20

__all__ = ["main"]

SCORES = ("max_softmax", "entropy", "energy", "gradnorm", "gradtrust")
"""The callback's default scores: of the logits and of the head."""


class _Module(LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.network(inputs)
        return logits

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


@dataclass(frozen=True)
class Case:
    """A model and its data.

    Args:
        network: Builds the model.
        shape: The shape of one sample.
        batch: Samples per batch.
        batches: Number of batches.
    """

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    batches: int


def _tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))


CASES = {
    "ResNet-20, 256 images of 32 px per batch": Case(resnet20, (3, 32, 32), 256, 4),
    "MLP 16-32-10, 64 samples per batch": Case(_tiny, (16,), 64, 500),
}


def _run(case: Case, callbacks: Sequence[Any]) -> Callable[[], None]:
    torch.manual_seed(0)
    module = _Module(case.network())
    samples = case.batch * case.batches
    data = TensorDataset(torch.randn(samples, *case.shape), torch.randint(10, (samples,)))
    loader = DataLoader(data, case.batch)

    def run() -> None:
        trainer = Trainer(
            accelerator="cpu",
            callbacks=list(callbacks),
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.predict(module, loader, return_predictions=False)

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks callback", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    facts, rows = environment("cpu"), []
    for name, case in CASES.items():
        functions = {
            "predict": _run(case, []),
            "callback": _run(case, [lgm.GradientMetrics(SCORES, print_summary=False)]),
        }
        times = interleaved(functions, options.rounds)
        ratio, low, high = summary(times, "predict")["callback"]["ratio"]
        extra = sorted(b - a for a, b in zip(times["predict"], times["callback"], strict=True))[options.rounds // 2]
        row = {"case": name, "ratio": ratio, "low": low, "high": high, "ms per batch": 1e3 * extra / case.batches}
        rows.append(row)
    Console(width=120).print(_table(rows, facts))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "callback.json"
    path.write_text(json.dumps({"environment": facts, "rows": rows}, indent=2) + "\n")


def _table(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Table:
    caption = ", ".join(f"{key} {value}" for key, value in facts.items())
    table = Table(title=f"predict with {len(SCORES)} head scores over predict", caption=caption, caption_justify="left")
    for column in ("case", "ratio", "quartiles", "extra ms per batch"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        quartiles = f"{row['low']:.2f} to {row['high']:.2f}"
        table.add_row(row["case"], f"{row['ratio']:.3f}", quartiles, f"{row['ms per batch']:.2f}")
    return table
