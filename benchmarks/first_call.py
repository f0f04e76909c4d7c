"""Measure what the first call on a model costs beyond a later one: time in training steps, peak memory, and new lengths.

All times are processor time on one thread. Planning imports and compiles nothing in the measured calls, because another model
has run before them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lightning_gradmetrics as lgm
from benchmarks import large, small
from benchmarks.measure import environment, peak_memory, spread
from benchmarks.peers import training_step
from benchmarks.steps import built, processor_seconds

__all__ = ["main"]

CASES = {
    **{name: small.CASES[name] for name in ("MLP, 1024", "CNN 8x8, 64", "LSTM 2 x 256, 16 x 64")},
    **{name: large.CASES[name] for name in large.CASES if "256" not in name or "BERT" in name},
}
"""The cases by name: three small models, and all large ones."""

TEXTS = 16
SEQUENCE_LENGTHS = (32, 40, 48, 56, 64, 61, 53, 45, 37)
"""Lengths of consecutive batches of texts; all but the first three test whether a new length costs more than a known one."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks first_call", description=__doc__)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="number of models, each with its first call")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory, which takes new processes")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"))
    parser.add_argument("--peak-of", nargs=2, metavar=("CASE", "WHAT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.peak_of:
        print(_peak(*options.peak_of))
        return
    lgm.gradient_statistics(*built(small.CASES["CNN 8x8, 64"]), "pseudo_label")
    rows, console = [], Console(width=None if sys.stdout.isatty() else 120)
    for case in options.case:
        row: dict[str, Any] = {"case": case, "extra steps": spread(_extra_steps(case, options.rounds))}
        if case in large.CASES and not options.no_memory:  # small models have less memory than torch's own buffers
            row |= {f"peak of {what}": _peak_of(case, what) for what in ("first call", "step")}
        rows.append(row)
    lengths, facts = new_lengths(options.rounds), environment("cpu")
    console.print(_table(rows, facts))
    median, low, high = lengths
    console.print(f"a new length of BERT 4 x 256, {TEXTS} texts: {median:.3f} steps more ({low:.3f} to {high:.3f})")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "first_call.json"
    path.write_text(json.dumps({"environment": facts, "rows": rows, "new length": lengths}, indent=2) + "\n")
    console.print(f"written: {path}")


def _extra_steps(case: str, rounds: int) -> list[float]:
    """Return the time of a first call less that of a later one, in training steps, for several models."""
    extra = []
    for _ in range(rounds):
        model, x = built(CASES[case])
        first = processor_seconds(_statistics(model, x), 1)
        later = processor_seconds(_statistics(model, x), 5)
        step = training_step(model, x)
        step()
        extra.append((first - later) / processor_seconds(step, 5))
    return extra


def new_lengths(rounds: int) -> tuple[float, float, float]:
    """Return what a batch of a new length costs beyond one of a known length, in training steps: the median and the quartiles."""
    extra = []
    for _ in range(rounds):
        model, _ = built(large.CASES["BERT 4 x 256, 16 x 64"])
        for number, length in enumerate(SEQUENCE_LENGTHS):
            tokens = torch.randint(large.TOKENS, (TEXTS, length))
            new, known = (processor_seconds(_statistics(model, tokens), 1) for _ in range(2))
            step = training_step(model, tokens)
            step()
            if number >= 3:
                extra.append((new - known) / processor_seconds(step, 3))
    return spread(extra)


def _statistics(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    return lambda: lgm.gradient_statistics(model, x, "pseudo_label")


def _peak_of(case: str, what: str) -> float:
    """Return the peak memory of a function, divided by the memory of the parameters; it runs in a new process."""
    command = [sys.executable, "-m", "benchmarks", "first_call", "--peak-of", case, what]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(process.stdout.strip().splitlines()[-1])


def _peak(case: str, what: str) -> float:
    """Return what a first call or a step on four samples adds to the memory, divided by the memory of the parameters."""
    lgm.gradient_statistics(*built(small.CASES["CNN 8x8, 64"]), "pseudo_label")
    model, x = built(CASES[case])
    function = _statistics(model, x[:4]) if what == "first call" else training_step(model, x[:4])
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    before = peak_memory()
    function()
    return (peak_memory() - before) / parameters


def _table(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Table:
    caption = ", ".join(f"{key} {value}" for key, value in facts.items())
    table = Table(title="the first call on a model", caption=caption, caption_justify="left")
    for column in ("case", "extra steps", "quartiles", "peak memory / parameters", "of a step"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        median, low, high = row["extra steps"]
        peaks = [f"{row[f'peak of {what}']:.1f}" if f"peak of {what}" in row else "" for what in ("first call", "step")]
        table.add_row(row["case"], f"{median:.2f}", f"{low:.2f} to {high:.2f}", *peaks)
    return table
