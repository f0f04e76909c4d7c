"""Compare ``cosine_similarity_maps`` with the gga-csm package: ``python -m benchmarks gga``.

The functions run in turn in one process, on the same model and batch. Each ratio is a time divided by that of the
package's function, which is patched because it creates its labels on CUDA. ``every_class`` shows what part of the gain
comes from leaving out parameter gradients: it takes C backward passes without them, ``cosine_similarity_maps`` C - 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import CASES
from lightning_gradmetrics.gradients import cosine_maps as cosine_similarity
from lightning_gradmetrics.gradients.cosine_maps import cosine_similarity_maps

__all__ = ["compare", "main", "original"]


def original(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the maps of the gga-csm package, on the device of the inputs."""
    import gga.CSM

    patched, ones = ModuleType("torch"), torch.ones
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patched.__dict__.update(torch.__dict__)
    patched.ones = lambda *size, device=None, **kwargs: ones(*size, device=inputs.device, **kwargs)
    gga.CSM.torch = patched
    try:
        return gga.CSM.cosine_similarity_maps(model, inputs).detach()
    finally:
        gga.CSM.torch = torch


def every_class(model: nn.Module, inputs: Tensor) -> None:
    """Compute the input gradients of all C classes, without parameter gradients."""
    flags = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    leaf = inputs.detach().clone().requires_grad_()
    logits = model(leaf)
    order = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
    for row in cosine_similarity.class_covectors(logits.detach(), order).transpose(0, 1):
        torch.autograd.grad(logits, leaf, row, retain_graph=True)
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Return the seconds of one call."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(*arguments)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(case: str, batch: int, repeats: int, device: str) -> dict[str, Any]:
    """Return one row: times in milliseconds, their ratios to the package, and the differences of the maps."""
    model, inputs = CASES[case].build(device, batch)
    runs = {"original": original, "every_class": every_class, "ours": cosine_similarity_maps}
    for function in runs.values():
        function(model, inputs)
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, function in runs.items():
            times[name].append(seconds(function, model, inputs))
    row: dict[str, Any] = {"case": case, "batch": batch}
    row |= {f"{name}_ms": round(1e3 * min(measured), 1) for name, measured in times.items()}
    for name in ("every_class", "ours"):
        row[f"{name}_ratio_min"] = round(min(times[name]) / min(times["original"]), 3)
        ratios = [a / b for a, b in zip(times[name], times["original"], strict=True)]
        row[f"{name}_ratio_median"] = round(statistics.median(ratios), 3)
    differences = (original(model, inputs) - cosine_similarity_maps(model, inputs)).abs()
    return row | {"largest_difference": float(differences.max()), "mean_difference": float(differences.mean())}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the comparison, print one row per batch size, and write JSON with ``--json``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gga", description=__doc__)
    parser.add_argument("--case", choices=sorted(CASES), default="resnet20")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for batch in options.batch:
        rows.append(compare(options.case, batch, options.repeats, options.device))
        print(json.dumps(rows[-1]), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"torch": torch.__version__, "device": options.device, "rows": rows}, indent=2)
        )
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
