"""Measure the time that the callback adds to ``trainer.predict``, and the time of each head score."""

from __future__ import annotations

import argparse
import json
import logging
import time
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
from benchmarks.measure import environment, interleaved, spread, summary
from benchmarks.models import resnet20
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.registry import make

__all__ = ["main"]

SCORES = ("max_softmax", "entropy", "energy", "gradnorm", "gradtrust")
"""The callback's default scores; they need only the logits and the head."""


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
        network: Function that builds the model.
        shape: Shape of one sample.
        batch: Number of samples per batch.
        batches: Number of batches.
    """

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    batches: int


def _tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))


CASES = {
    "ResNet-20, 256 images of 32 px per batch": Case(resnet20, (3, 32, 32), 256, 8),
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


HEAD_SCORES = [
    "max_logit",
    "log_likelihood",
    "feature_norm",
    "max_softmax",
    "entropy",
    "margin",
    "energy",
    "doctor",
    "gen",
    "max_logit_pnorm",
    "gradtrust",
    "gradnorm",
    "uniform",
    "gradnorm_kl",
    "pseudo_label",
    "exgrad",
    "fisher_trace",
    "pgn",
]
"""Every score of the logits or the head that needs no fit."""

HEAD_BATCH = {"samples": 256, "classes": 1000, "features": 512}


def head_scores(rounds: int) -> list[dict[str, Any]]:
    """Return the processor time of each head score; every call gets new evidence."""
    torch.manual_seed(0)
    samples = HEAD_BATCH["samples"]
    logits, features = torch.randn(samples, HEAD_BATCH["classes"]), torch.randn(samples, HEAD_BATCH["features"]).relu()
    rows = []
    for name in HEAD_SCORES:
        score, milliseconds = make(name), []
        for _ in range(rounds + 3):
            start = time.process_time()
            score(Evidence(logits, features))
            milliseconds.append(1e3 * (time.process_time() - start))
        median, low, high = spread(milliseconds[3:])
        rows.append({"score": name, "ms": median, "low": low, "high": high})
    return rows


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
    head_rows = head_scores(10 * options.rounds)
    console = Console(width=120)
    console.print(_table(rows, facts))
    console.print(_head_table(head_rows))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "callback.json"
    path.write_text(json.dumps({"environment": facts, "rows": rows, "head scores": head_rows}, indent=2) + "\n")


def _table(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Table:
    caption = ", ".join(f"{key} {value}" for key, value in facts.items())
    table = Table(
        title=f"time of predict with {len(SCORES)} head scores / predict", caption=caption, caption_justify="left"
    )
    for column in ("case", "ratio", "quartiles", "extra ms per batch"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        quartiles = f"{row['low']:.2f} to {row['high']:.2f}"
        table.add_row(row["case"], f"{row['ratio']:.3f}", quartiles, f"{row['ms per batch']:.2f}")
    return table


def _head_table(rows: Sequence[dict[str, Any]]) -> Table:
    sizes = ", ".join(f"{number} {name}" for name, number in HEAD_BATCH.items())
    table = Table("score", "ms", "quartiles", title=f"time of each head score: {sizes}")
    for row in rows:
        table.add_row(row["score"], f"{row['ms']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}")
    return table
