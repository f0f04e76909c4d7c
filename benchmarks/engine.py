"""Compare the engine's time and memory with a training step and with other software."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import peers
from benchmarks.measure import environment, interleaved, peak_memory, summary
from benchmarks.models import CASES
from lightning_gradmetrics.engine.kernels.library import plain_kernels

__all__ = ["main"]

BARS = {
    ("resnet20", "full"): 1.25,
    ("resnet18", "full"): 1.5,
    ("vit", "full"): 1.4,
    ("resnet20", "squares"): 1.1,
    ("resnet18", "squares"): 0.9,
}
LABELS = {
    "step": "training step",
    "full": "max/min/mean/std/L1/L2",
    "squares": "mean/std/L2",
    "vmap": "vmap(grad) + reductions",
    "pytorch-ood": "pytorch-ood GradUncertainty",
    "gradient_metrics": "gradient_metrics",
}
PARTS = ("time", "kernels", "peers", "memory")
PEERS = {"vmap": 1.8, "pytorch-ood": 1.8, "gradient_metrics": 150.0}
MEMORY_BAR = 0.15


@dataclass
class Row:
    """One row of the table: a figure and its bar."""

    case: str
    batch: int
    what: str
    figure: float
    low: float
    high: float
    bar: float | None
    higher_is_better: bool
    kind: str
    ms: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the figure meets its bar; None without a bar."""
        if self.bar is None:
            return None
        return self.figure >= self.bar if self.higher_is_better else self.figure <= self.bar


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks engine", description=__doc__)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), help="models to measure")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=["time", "peers", "memory"])
    parser.add_argument("--rounds", type=int, default=9, help="number of rounds, for medians and quartiles")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "tf32", "bf16"])
    parser.add_argument("--memory-batches", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--samples", type=int, default=8, help="samples that gradient_metrics runs on; 0 for all")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"))
    parser.add_argument("--peak-of", nargs=3, metavar=("CASE", "BATCH", "WHAT"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write a JSON file."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.precision == "tf32"
    if options.peak_of:
        print(json.dumps(_peak(options)))
        return
    rows: list[Row] = []
    console = Console(width=None if sys.stdout.isatty() else 160)
    facts = environment(options.device) | {"precision": options.precision}
    measured = {"time": _time, "kernels": _kernels, "peers": _peers, "memory": _memory}
    for case in options.case:
        for part in options.part:
            with console.status(f"{case}: {part}"):
                rows += list(measured[part](case, options))
    console.print(_table(rows, facts))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"engine-{options.device}-{options.precision}.json"
    records = [asdict(row) | {"met": row.met} for row in rows]
    path.write_text(json.dumps({"environment": facts, "rows": records}, indent=2) + "\n")
    console.print(f"written: {path}")


def _precision(options: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16")


def _time(case: str, options: argparse.Namespace) -> Iterator[Row]:
    model, x = CASES[case].build(options.device)
    functions = {
        "step": peers.training_step(model, x),
        "full": peers.lgm_engine(model, x, peers.FULL),
        "squares": peers.lgm_engine(model, x, peers.SQUARES),
    }
    with _precision(options):
        results = summary(interleaved(functions, options.rounds, options.device), "step")
    for name, values in results.items():
        bar = BARS.get((case, name))
        yield Row(case, len(x), LABELS[name], *values["ratio"], bar, False, "time / step", values["ms"][0])


def _kernels(case: str, options: argparse.Namespace) -> Iterator[Row]:
    """Yield the engine's times with compiled kernels and with plain torch, relative to a training step."""
    model, x = CASES[case].build(options.device)
    engines = {name: peers.lgm_engine(model, x, getattr(peers, name.upper())) for name in ("full", "squares")}
    functions = {"step": peers.training_step(model, x)}
    for name, run in engines.items():
        functions[f"{name}, compiled"], functions[f"{name}, plain torch"] = run, _plain(run)
    with _precision(options):
        results = summary(interleaved(functions, options.rounds, options.device), "step")
    for name in engines:
        for form in ("compiled", "plain torch"):
            values = results[f"{name}, {form}"]
            label = f"{LABELS[name]}, {form}"
            yield Row(case, len(x), label, *values["ratio"], None, False, "time / step", values["ms"][0])


def _plain(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that runs without the compiled kernels."""

    def plain() -> Any:
        with plain_kernels():
            return run()

    return plain


def _peers(case: str, options: argparse.Namespace) -> Iterator[Row]:
    model, x = CASES[case].build(options.device)
    functions = {
        "full": peers.lgm_engine(model, x, peers.FULL),
        "vmap": peers.vmap_grad(model, x),
        "pytorch-ood": peers.pytorch_ood(model, x),
    }
    # The other software fits in memory only for ResNet-20: it stores one gradient per sample and parameter.
    rounds = max(1, options.rounds // 3)
    with _precision(options):
        results = summary(interleaved(functions, rounds, options.device), "full")
    for name in ("vmap", "pytorch-ood"):
        bar = PEERS[name] if case == "resnet20" else None
        values = results[name]
        yield Row(case, len(x), LABELS[name], *values["ratio"], bar, True, "times slower", values["ms"][0])
    if case == "resnet20" and options.device == "cpu":
        yield _seed(case, model, x, results["full"]["ms"][0], options.samples or len(x))


def _seed(case: str, model: torch.nn.Module, x: torch.Tensor, full: float, samples: int) -> Row:
    seconds = peers.gradient_metrics_seconds(model, x, samples)
    ratio = seconds * 1e3 / full
    note = f"scaled from {samples} of {len(x)} samples in the graph of the whole batch" if samples < len(x) else ""
    name = "gradient_metrics"
    return Row(case, len(x), LABELS[name], ratio, ratio, ratio, PEERS[name], True, "times slower", seconds * 1e3, note)


def _memory(case: str, options: argparse.Namespace) -> Iterator[Row]:
    """Yield the extra peak memory relative to a training step; each measurement has a new process.

    A batch that needs more memory than the machine has is left out, with a message.
    """
    for batch in options.memory_batches:
        try:
            step, *peaks = [_peak_of(case, batch, what, options) for what in ("step", "full", "squares")]
        except subprocess.CalledProcessError as error:
            if error.returncode != -signal.SIGKILL:
                raise
            print(f"{case}, batch {batch}: left out, the system killed a process for its memory", file=sys.stderr)
            continue
        note = f"training step: {step / 2**20:.0f} MiB"
        for what, peak in zip(("full", "squares"), peaks, strict=True):
            extra, label = peak / step - 1, f"extra peak memory, {LABELS[what]}"
            yield Row(case, batch, label, extra, extra, extra, MEMORY_BAR, False, "fraction of a step", None, note)


def _peak_of(case: str, batch: int, what: str, options: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "benchmarks", "engine", "--peak-of", case, str(batch), what]
    command += ["--device", options.device, "--precision", options.precision, "--threads", str(options.threads)]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(process.stdout.strip().splitlines()[-1]))


def _peak(options: argparse.Namespace) -> int:
    """Return the bytes that a full batch adds to the memory after a warm-up on two samples."""
    case, batch, what = options.peak_of
    model, x = CASES[case].build(options.device, int(batch))

    def function(inputs: torch.Tensor) -> Any:
        statistics = peers.FULL if what == "full" else peers.SQUARES
        return peers.training_step(model, inputs) if what == "step" else peers.lgm_engine(model, inputs, statistics)

    with _precision(options):
        function(x[:2])()
        model.zero_grad(set_to_none=True)
        before = _resident(options.device)
        for _ in range(2):
            function(x)()
    return peak_memory(options.device) - before


def _resident(device: str) -> int:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory()
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(lines["VmRSS"].split()[0]) * 1024


def _table(rows: list[Row], facts: dict[str, Any]) -> Table:
    caption = ", ".join(f"{key} {value}" for key, value in facts.items())
    table = Table(title="engine", caption=caption, caption_justify="left")
    for column in ("case", "batch", "measurement", "figure", "quartiles", "unit", "ms", "bar", "met", "note"):
        table.add_column(column, justify="right" if column in ("batch", "figure", "quartiles", "ms", "bar") else "left")
    for row in rows:
        met = {None: "", True: "yes", False: "no"}[row.met]
        figures = (f"{row.figure:.2f}", f"{row.low:.2f} to {row.high:.2f}", row.kind)
        ms, bar = ("" if value is None else f"{value:.4g}" for value in (row.ms, row.bar))
        table.add_row(row.case, str(row.batch), row.what, *figures, ms, bar, met, row.note)
    return table
