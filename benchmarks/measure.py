"""Time functions side by side, and describe the machine."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

__all__ = ["environment", "interleaved", "peak_memory", "spread", "summary"]


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Return the seconds of each function in each round, after a warm-up round.

    Every round runs all functions, and each round starts with a different one. Other work on the machine slows all
    functions of a round alike, so ratios are taken within a round.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for number in range(-1, rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds = _timed(functions[name], device)
            if number >= 0:
                times[name].append(seconds)
    return times


def _timed(function: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(values: list[float]) -> tuple[float, float, float]:
    """Return the median and the quartiles."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def summary(times: Mapping[str, list[float]], unit: str) -> dict[str, dict[str, Any]]:
    """Return the median and quartiles of each function's milliseconds, and of its ratio to ``unit`` per round."""
    rows = {}
    for name, values in times.items():
        ratios = [value / reference for value, reference in zip(values, times[unit], strict=True)]
        rows[name] = {
            "ms": [1e3 * seconds for seconds in spread(values)],
            "ratio": spread(ratios),
            "rounds": len(values),
        }
    return rows


def peak_memory(device: str = "cpu") -> int:
    """Return the peak memory of this process, or of its GPU, in bytes."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would start at the peak of the parent process
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment(device: str) -> dict[str, Any]:
    """Return the date, the hardware and the software versions, which the figures depend on."""
    from lightning_gradmetrics.engine.kernels.native import supports

    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiled kernels": supports(torch.zeros(1), {"sum"}),
    }
    return facts | ({"device": torch.cuda.get_device_name()} if device != "cpu" else {})


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()
