"""Compare both modes of the AUROC meter with torchmetrics and scikit-learn: ``python -m benchmarks meters``.

Times are medians; for each size, the methods take turns in one process. Scores are in [0, 1], where the meters of
torchmetrics are correct too. Each memory figure comes from a new process: it shows by how much the peak memory grows
after the first WARM batches of a stream. The row "no meter" is a stream without a meter. There are two figures. For the
column "live", glibc's MALLOC_MMAP_THRESHOLD_ makes the C library return freed blocks at once, so fragmentation of the
heap does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torchmetrics.classification import BinaryAUROC

from lightning_gradmetrics.meters import AUROC

BATCH = 1_000_000
WARM = 20
EXACT_UP_TO = 10**7
Batches = Iterator[tuple[Tensor, Tensor]]


class ScikitLearn:
    """``roc_auc_score`` of scikit-learn with the interface of a meter."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []

    def update(self, scores: Tensor, target: Tensor) -> None:
        """Store a batch."""
        self.batches.append((scores, target))

    def compute(self) -> float:
        """Return the AUROC of all batches."""
        scores, target = (torch.cat(tensors).numpy() for tensors in zip(*self.batches, strict=True))
        return float(roc_auc_score(target, scores))


class NoMeter:
    """A meter that stores nothing, to measure the cost of the stream."""

    def update(self, scores: Tensor, target: Tensor) -> None:
        """Ignore a batch."""

    def compute(self) -> float:
        """Return NaN."""
        return float("nan")


METHODS: dict[str, Callable[[], Any]] = {
    "exact": AUROC,
    "constant, 4096 bins": lambda: AUROC(bins=4096),
    "constant, 16384 bins": lambda: AUROC(bins=16384),
    "torchmetrics, 200 thresholds": lambda: BinaryAUROC(thresholds=200),
    "torchmetrics, exact": BinaryAUROC,
    "scikit-learn": ScikitLearn,
}


STREAMED: dict[str, Callable[[], Any]] = {
    "constant, 16384 bins": METHODS["constant, 16384 bins"],
    "exact": AUROC,
    "no meter": NoMeter,
}


def stream(size: int, batch: int, seed: int = 0) -> Batches:
    """Yield batches of scores in [0, 1] and targets; a fifth are positive, with shifted scores."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, size, batch):
        number = min(batch, size - start)
        target = torch.rand(number, generator=generator) < 0.2
        yield torch.sigmoid(torch.randn(number, generator=generator) + target), target.long()


def timed(make: Callable[[], Any], batches: Batches) -> dict[str, float]:
    """Return the seconds of all updates and of compute, and the value."""
    meter, seconds = make(), 0.0
    for scores, target in batches:
        start = time.perf_counter()
        meter.update(scores, target)
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    value = float(meter.compute())
    return {"update_s": seconds, "compute_s": time.perf_counter() - start, "value": value}


def compare(size: int, batch: int, repeats: int, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row per method: median times, and the absolute error of the value."""
    data = list(stream(size, batch))
    turns = [{name: timed(METHODS[name], iter(data)) for name in methods} for _ in range(repeats)]
    scores, targets = zip(*data, strict=True)
    exact = roc_auc_score(torch.cat(targets).numpy(), torch.cat(scores).double().numpy())
    rows = []
    for name in methods:
        update, compute = (statistics.median(turn[name][key] for turn in turns) for key in ("update_s", "compute_s"))
        error = abs(turns[0][name]["value"] - exact)
        rows.append(
            {"method": name, "size": size, "batch": batch, "update_s": update, "compute_s": compute, "error": error}
        )
    return rows


def alone(name: str, size: int) -> dict[str, Any]:
    """Run one method in this process; return its times and the growth of peak memory after a warm-up."""
    make, batches = STREAMED[name], stream(size, BATCH)
    timed(make, stream(WARM * BATCH, BATCH))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = timed(make, batches)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"method": name, "size": size, "batch": BATCH, **times, "growth_mib": growth}


def streamed(name: str, size: int, threads: int) -> dict[str, Any]:
    """Run one method on a stream in two new processes; return its times and both memory figures."""
    unmodified = in_fresh_process(name, size, threads, {})
    live = in_fresh_process(name, size, threads, {"MALLOC_MMAP_THRESHOLD_": "65536"})
    return {**unmodified, "live_mib": live["growth_mib"]}


def in_fresh_process(name: str, size: int, threads: int, environment: dict[str, str]) -> dict[str, Any]:
    options = ["--alone", name, "--sizes", str(size), "--threads", str(threads)]
    command = [sys.executable, "-m", "benchmarks.meters", *options]
    process = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    return dict(json.loads(process.stdout))


def shown(rows: Sequence[dict[str, Any]]) -> Table:
    memory = ("memory growth, MiB", "live, MiB")
    table = Table("method", "scores", "batch", "update, million/s", "compute, s", "error, AUROC points", *memory)
    for row in rows:
        rate = f"{row['size'] / row['update_s'] / 1e6:.2f}" if row["method"] != "no meter" else "-"
        error = f"{100 * row['error']:.5f}" if "error" in row else "-"
        growth = [f"{row[key]:.0f}" if key in row else "-" for key in ("growth_mib", "live_mib")]
        cells = (f"{row['size']:.0e}", f"{row['batch']:.0e}", rate, f"{row['compute_s']:.3f}", error)
        table.add_row(row["method"], *cells, *growth)
    return table


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the comparison, print the table, and write JSON with ``--json``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks meters", description=__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e4, 1e6], help="numbers of scores for all methods")
    parser.add_argument("--batches", type=float, nargs="+", default=[4096, BATCH])
    parser.add_argument("--stream", type=float, nargs="*", default=[1e6, 1e8], help="numbers of scores for the memory")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", choices=STREAMED, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.alone:
        print(json.dumps(alone(options.alone, int(options.sizes[0]))))
        return []
    rows: list[dict[str, Any]] = []
    console = Console(stderr=True)
    for size in map(int, options.sizes):
        for batch in sorted({min(int(batch), size) for batch in options.batches}):
            with console.status(f"{size:.0e} scores in batches of {batch}"):
                rows += compare(size, batch, options.repeats, list(METHODS))
    for size in map(int, options.stream):
        with console.status(f"a stream of {size:.0e} scores"):
            names = [name for name in STREAMED if name != "exact" or size <= EXACT_UP_TO]
            rows += [streamed(name, size, options.threads) for name in names]
    Console(width=140).print(shown(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {"torch": torch.__version__, "threads": options.threads, "rows": rows}
        options.json.write_text(json.dumps(facts, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
