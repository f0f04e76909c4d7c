"""Compare the engine and other software with a training step, on small models.

All times are processor time on one thread, because other work on the machine distorts such short wall times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.measure import environment, summary
from benchmarks.models import resnet20

__all__ = ["CASES", "main"]

LEAST_SECONDS = 0.02
"""Minimum processor time of one measurement; shorter functions are repeated."""


def mlp(norm: bool = False) -> nn.Module:
    """Return a network for tables with 16 columns and 3 classes; it has three hidden layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((16, 64), (64, 64), (64, 32)):
        layers.append(nn.Linear(inputs, outputs))
        if norm:
            layers.append(nn.BatchNorm1d(outputs))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(32, 3))


class _Splines(nn.Module):
    """A Kolmogorov-Arnold layer: sums of radial basis functions of each input."""

    def __init__(self, inputs: int, outputs: int, bases: int = 8) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(0.1 * torch.randn(outputs, inputs, bases))
        self.scale = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.register_buffer("centres", torch.linspace(-2, 2, bases))

    def forward(self, x: Tensor) -> Tensor:
        bases = torch.exp(-((x[..., None] - self.centres) ** 2))
        smooth = torch.einsum("nib,oib->no", bases, self.coefficients)
        return smooth + torch.einsum("ni,oi->no", nn.functional.silu(x), self.scale)


def kan() -> nn.Module:
    """Return a Kolmogorov-Arnold network; its parameters are used in einsum, outside torch layers."""
    return nn.Sequential(_Splines(8, 16), _Splines(16, 4))


def small_cnn() -> nn.Module:
    """Return two convolutions with 16 channels and a linear layer, for 8x8 images."""
    convolutions = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(1024, 10))


class _MeanOfEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(2000, 32), nn.Linear(32, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.table(tokens).mean(1))
        return logits


def fast_text() -> nn.Module:
    """Return an embedding bag (mean) and a linear layer."""
    return nn.Sequential(nn.EmbeddingBag(20000, 64), nn.Linear(64, 4))


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layers, self.head = kind(64, 256, 2, batch_first=True), nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(x)[0][:, -1])
        return logits


Case = tuple[Callable[[], nn.Module], tuple[int, ...], int]
"""Function that builds the model, shape of the batch, and size of the vocabulary (0 for real inputs)."""

CASES: dict[str, Case] = {
    "MLP, 32": (mlp, (32, 16), 0),
    "MLP, 1024": (mlp, (1024, 16), 0),
    "MLP with batch norm, 32": (lambda: mlp(norm=True), (32, 16), 0),
    "MLP with batch norm, 1024": (lambda: mlp(norm=True), (1024, 16), 0),
    "KAN, 1024": (kan, (1024, 8), 0),
    "CNN 8x8, 64": (small_cnn, (64, 1, 8, 8), 0),
    "CNN 8x8, 512": (small_cnn, (512, 1, 8, 8), 0),
    "fastText, 32 x 20": (fast_text, (32, 20), 20000),
    "mean of embeddings, 32 x 20": (_MeanOfEmbeddings, (32, 20), 2000),
    "ResNet-20, 1": (resnet20, (1, 3, 32, 32), 0),
    "ResNet-20, 8": (resnet20, (8, 3, 32, 32), 0),
    "LSTM 2 x 256, 16 x 64": (lambda: _Recurrent(nn.LSTM), (16, 64, 64), 0),
    "GRU 2 x 256, 16 x 64": (lambda: _Recurrent(nn.GRU), (16, 64, 64), 0),
}


def built(case: str) -> tuple[nn.Module, Tensor]:
    """Return the model in eval mode and its batch, the same in every call."""
    make, shape, tokens = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model, torch.randint(tokens, shape) if tokens else torch.randn(shape)


def functions(model: nn.Module, x: Tensor, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Return the measured functions by name."""
    runs = {
        "step": peers.training_step(model, x),
        "all six": peers.lgm_engine(model, x, peers.FULL),
        "L2": peers.lgm_engine(model, x, ("l2",)),
    }
    if options.compile:
        runs["all six, compiled"] = peers.lgm_engine(model, x, peers.FULL, compiled=True)
        runs["L2, compiled"] = peers.lgm_engine(model, x, ("l2",), compiled=True)
    if options.peers:
        for name, make in peers.SMALL.items():
            runs[name] = _lazily(make, model, x)
    return runs


def _lazily(make: Callable[[nn.Module, Tensor], Callable[[], Any]], model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Return a function that calls ``make`` on its first call, so that errors of ``make`` occur there."""
    cached: list[Callable[[], Any]] = []

    def run() -> Any:
        if not cached:
            cached.append(make(model, x))
        return cached[0]()

    return run


def processor_seconds(function: Callable[[], Any], repeats: int) -> float:
    """Return the median processor time of several calls."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def measured(runs: Mapping[str, Callable[[], Any]], rounds: int, console: Console) -> dict[str, dict[str, Any]]:
    """Return times and ratios to the training step, after two warm-up calls; print the functions that fail."""
    running, repeats = {}, {}
    for name, function in runs.items():
        try:
            function()
            function()
        except Exception as error:
            console.print(f"  {name}: {type(error).__name__}: {str(error)[:120]}")
            continue
        running[name] = function
        repeats[name] = max(1, min(25, round(LEAST_SECONDS / processor_seconds(function, 1))))
    times: dict[str, list[float]] = {name: [] for name in running}
    names = list(running)
    for number in range(rounds):
        for name in names if number % 2 else names[::-1]:
            times[name].append(processor_seconds(running[name], repeats[name]))
    return summary(times, "step")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks small", description=__doc__)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, help="upper limit of the batch size in every case")
    parser.add_argument("--compile", action="store_true", help="also measure compiled plans (up to two minutes each)")
    parser.add_argument("--peers", action="store_true", help="also measure other software")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write a JSON file."""
    options, console = _options(arguments), Console(width=None if sys.stdout.isatty() else 150)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for case in options.case:
        model, x = built(case)
        x = x[: options.batch]
        results = measured(functions(model, x, options), options.rounds, console)
        for what, values in results.items():
            median, low, high = values["ratio"]
            rows.append({"case": case, "what": what, "ratio": median, "low": low, "high": high, "ms": values["ms"][0]})
            console.print(f"{case:28} {what:20} {median:7.2f} ({low:.2f} to {high:.2f}) {values['ms'][0]:9.2f} ms")
        sys.stdout.flush()
    facts = environment("cpu")
    console.print(_table(rows, facts))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "small.json"
    path.write_text(json.dumps({"environment": facts, "rows": rows}, indent=2) + "\n")
    console.print(f"written: {path}")


def _table(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> Table:
    caption = ", ".join(f"{key} {value}" for key, value in facts.items())
    table = Table(title="processor time relative to a training step", caption=caption, caption_justify="left")
    for column in ("case", "measurement", "ratio", "quartiles", "ms"):
        table.add_column(column, justify="left" if column in ("case", "measurement") else "right")
    for row in rows:
        quartiles = f"{row['low']:.2f} to {row['high']:.2f}"
        table.add_row(row["case"], row["what"], f"{row['ratio']:.2f}", quartiles, f"{row['ms']:.2f}")
    return table
