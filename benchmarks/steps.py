"""Time the engine and other software in training steps.

All times are processor time on one thread, because other work on the machine distorts wall times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.measure import environment, summary

__all__ = ["Case", "built", "compare", "processor_seconds"]

Case = tuple[Callable[[], nn.Module], tuple[int, ...], int]
"""Function that builds the model, shape of the batch, and size of the vocabulary (0 for real inputs)."""

LEAST_SECONDS = 0.02
"""Minimum processor time of one measurement; shorter functions are repeated."""


def built(case: Case) -> tuple[nn.Module, Tensor]:
    """Return the model in eval mode and its batch, the same in every call."""
    make, shape, tokens = case
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


def _options(name: str, what: str | None, cases: Iterable[str], arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=what)
    parser.add_argument("--case", nargs="+", choices=list(cases), default=list(cases))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, help="upper limit of the batch size in every case")
    parser.add_argument("--compile", action="store_true", help="also measure compiled plans (up to two minutes each)")
    parser.add_argument("--peers", action="store_true", help="also measure other software")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"))
    return parser.parse_args(arguments)


def compare(name: str, what: str | None, cases: Mapping[str, Case], arguments: Sequence[str] | None) -> None:
    """Measure the cases of a benchmark, print the table and write a JSON file.

    Args:
        name: Name of the benchmark.
        what: What it measures, for ``--help``.
        cases: The cases by name.
        arguments: The options of the command line.
    """
    options, console = _options(name, what, cases, arguments), Console(width=None if sys.stdout.isatty() else 150)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for case in options.case:
        model, x = built(cases[case])
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
    path = options.output / f"{name}.json"
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
