"""Measure what a user waits for: the import, the help and an error of the command, and its default run; all in new processes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import environment, spread

__all__ = ["main"]

COMMAND = [sys.executable, "-m", "lightning_gradmetrics.cli"]

RUNS: Mapping[str, Sequence[str]] = {
    "import torch": [sys.executable, "-c", "import torch"],
    "import torch, lightning_gradmetrics": [sys.executable, "-c", "import torch, lightning_gradmetrics"],
    "gradmetrics --help": [*COMMAND, "--help"],
    "gradmetrics score=entropie": [*COMMAND, "score=entropie"],
    "gradmetrics scores=entropy": [*COMMAND, "scores=entropy"],
    "gradmetrics": COMMAND,
}
"""The commands by name."""

WRONG = ("gradmetrics score=entropie", "gradmetrics scores=entropy")
"""The commands that name a score or a key that does not exist."""

QUICK = [name for name in RUNS if name != "gradmetrics"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks start", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"))
    options = parser.parse_args(arguments)
    for name in QUICK:  # fill the caches of files
        _seconds(name)
    seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    for _ in range(options.rounds):
        for name, values in seconds.items():
            values.append(_seconds(name))
    facts, table = environment("cpu"), Table("command", "wall seconds", "quartiles", title="start-up")
    for name, values in seconds.items():
        median, low, high = spread(values)
        table.add_row(name, f"{median:.2f}", f"{low:.2f} to {high:.2f}")
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "start.json"
    path.write_text(json.dumps({"environment": facts, "seconds": seconds}, indent=2) + "\n")
    console.print(f"written: {path}")


def _seconds(name: str) -> float:
    """Return the wall time of a command in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.run(RUNS[name], cwd=folder, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    if (process.returncode != 0) != (name in WRONG):
        raise RuntimeError(f"{name} ended with exit status {process.returncode}: {process.stderr[-500:]}")
    return seconds
