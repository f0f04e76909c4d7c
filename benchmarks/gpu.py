"""Check the engine on a GPU, then measure it on ResNet-50, ViT-S/16 and BERT-base.

The first part compares the engine and the callback with autograd in float64 on four small models. The second part
measures time and peak memory beside a training step, also for ``vmap(grad)`` and pytorch-ood. No new measurement starts
after ``--seconds``. Each result is written at once, to ``$OUT`` if it is set, so an interrupted run keeps its results.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lightning_gradmetrics as lgm
from benchmarks import peers
from benchmarks.gpu_parity import MODELS, Check, callback_check, engine_check, precision_of
from benchmarks.measure import environment, interleaved, summary

__all__ = ["main"]

PRECISIONS = ("tf32", "bf16", "float32")
ENGINE: dict[str, tuple[tuple[str, ...], bool]] = {
    "all six": (peers.FULL, False),
    "L2": (("l2",), False),
    "all six, compile=True": (peers.FULL, True),
}
"""The statistics, and whether the plan is compiled."""

PEERS: dict[str, Callable[[nn.Module, Tensor], Callable[[], Any]]] = {
    "vmap(grad), all six": peers.vmap_grad,
    "pytorch-ood, L2": peers.pytorch_ood,
}


class _Tokens(nn.Module):
    """BERT-base with random weights, called with one tensor of token ids ``(N, T)``."""

    def __init__(self, layers: int = 12) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        settings = BertConfig(num_hidden_layers=layers, num_labels=10, attn_implementation="sdpa")
        self.model = BertForSequenceClassification(settings)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits


def _resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50()


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(image_size=224, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536)
    nn.init.normal_(model.heads.head.weight, std=0.02)  # zeros would pass no gradient to the layers below
    return model


@dataclass(frozen=True)
class Case:
    """A model and its batch.

    Args:
        model: Function that builds the model.
        shape: Shape of the batch.
        tokens: Size of the vocabulary; 0 for images.
    """

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: int = 0

    def build(self, device: str) -> tuple[nn.Module, Tensor]:
        """Return the model in eval mode and a batch, the same in every call."""
        torch.manual_seed(0)
        model = self.model().eval().to(device)
        if self.tokens:
            return model, torch.randint(5, self.tokens, self.shape, device=device)
        batch = torch.randn(self.shape, device=device)
        return model, batch


CASES = {
    "ResNet-50, 64 x 224 px": Case(_resnet50, (64, 3, 224, 224)),
    "ViT-S/16, 64 x 224 px": Case(_vit, (64, 3, 224, 224)),
    "BERT-base, 32 x 128 tokens": Case(_Tokens, (32, 128), 30000),
}


def largest_error(model: nn.Module, batch: Tensor, precision: str, device: str) -> dict[str, float]:
    """Return the largest relative error of each statistic on two samples, against a float64 reference."""
    two_samples = batch[:2]
    with precision_of(precision, device):
        measured = lgm.gradient_statistics(model, two_samples, "pseudo_label", statistics=peers.FULL)
    exact_model = model.double()
    exact_input = two_samples.double() if two_samples.is_floating_point() else two_samples
    exact = lgm.gradient_statistics(exact_model, exact_input, "pseudo_label", statistics=peers.FULL, engine="reference")
    model.float()
    errors = {}
    for name in peers.FULL:
        truth = exact.statistic(name)
        errors[name] = float(((measured.statistic(name).double() - truth).abs() / truth.abs()).max())
    return errors


def _peak(function: Callable[[], Any], device: str) -> float:
    """Return the peak memory in MiB above that before the call."""
    if device != "cuda":
        return 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return float((torch.cuda.max_memory_allocated() - before) / 2**20)


def _held(device: str) -> float:
    """Return the memory in MiB that no tensor uses and that cannot be freed: that of CUDA graphs."""
    if device != "cuda":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return float((torch.cuda.memory_reserved() - torch.cuda.memory_allocated()) / 2**20)


class Report:
    """The results so far, in a file that is rewritten after every result.

    Args:
        path: The JSON file.
        seconds: Time after which no new measurement starts.
        device: Device of the measurements.
    """

    def __init__(self, path: Path, seconds: float, device: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.end = path, time.monotonic() + seconds
        self.console = Console(width=150)
        self.content: dict[str, Any] = {"environment": environment(device), "checks": [], "rows": [], "not run": []}
        self._save()

    def left(self) -> float:
        """Return the remaining seconds."""
        return self.end - time.monotonic()

    def add_check(self, check: Check) -> None:
        """Add the result of a check."""
        self.content["checks"].append(asdict(check))
        verdict = "passed" if check.passed else "FAILED"
        self._print(f"{check.what}: {verdict}, error {check.error:.1e}, {check.seconds:.1f} s {check.note}")

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Add a measurement."""
        self.content["rows"].append(dict(row))
        figures = f"{row['ratio']:6.2f} ({row['low']:.2f} to {row['high']:.2f}) {row['ms']:8.2f} ms"
        self._print(f"{row['case']}, {row['precision']}, {row['what']}: {figures}, peak {row['peak MiB']:.0f} MiB")

    def add_missing(self, what: str, reason: str) -> None:
        """Add a check or measurement that was not run, with the reason."""
        self.content["not run"].append({"what": what, "reason": reason})
        self._print(f"not run: {what}: {reason}")

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False)
        sys.stdout.flush()
        self._save()

    def _save(self) -> None:
        self.path.write_text(json.dumps(self.content, indent=2) + "\n")


def _checks(report: Report, device: str) -> None:
    """Run the checks; a check that raises an error counts as failed."""
    named: dict[str, Callable[[], Check]] = {}
    for precision in ("float32", "bf16"):
        for name in MODELS:
            named[f"{name}, {precision}"] = lambda name=name, precision=precision: engine_check(name, precision, device)
    named["callback in a Trainer"] = lambda: callback_check(device)
    for what, check in named.items():
        if report.left() <= 0:
            report.add_missing(what, "out of time")
            continue
        start = time.monotonic()
        try:
            report.add_check(check())
        except Exception as error:
            note = f"{type(error).__name__}: {str(error)[:300]}"
            report.add_check(Check(what, False, float("nan"), note, time.monotonic() - start))


def _measured(case: str, precision: str, report: Report, options: argparse.Namespace) -> None:
    """Measure a training step, the engine and other software for one model and precision."""
    model, batch = CASES[case].build(options.device)
    batch = batch[: options.batch] if options.batch else batch
    if options.errors:
        errors = largest_error(model, batch, precision, options.device)
        report.content.setdefault("errors", {})[f"{case}, {precision}"] = errors
    with precision_of(precision, options.device):
        step = peers.training_step(model, batch)
        for name, (statistics, compiled) in ENGINE.items():
            function = peers.lgm_engine(model, batch, statistics, compiled)
            _beside_step(step, {name: function}, (case, precision), report, options)
        for name, build in {} if options.no_peers else PEERS.items():
            try:
                function = build(model, batch)
            except ImportError as error:
                report.add_missing(f"{case}, {precision}, {name}", str(error))
                continue
            _beside_step(step, {name: function}, (case, precision), report, options)
    model.zero_grad(set_to_none=True)


def _beside_step(
    step: Callable[[], Any],
    functions: Mapping[str, Callable[[], Any]],
    where: tuple[str, str],
    report: Report,
    options: argparse.Namespace,
) -> None:
    """Measure functions in turn with a training step, in as many rounds as the remaining time allows."""
    for name, function in functions.items():
        what = f"{', '.join(where)}, {name}"
        if report.left() <= 0:
            report.add_missing(what, "out of time")
            continue
        try:
            peaks = {"training step": _peak(step, options.device)}
            function()  # the first call plans and compiles kernels
            peaks[name] = _peak(function, options.device) + _held(options.device)
            one_round = _seconds(step, options.device) + _seconds(function, options.device)
            rounds = max(1, min(options.rounds, int(report.left() / 4 / one_round)))
            results = summary(
                interleaved({"training step": step, name: function}, rounds, options.device), "training step"
            )
        except Exception as error:
            report.add_missing(what, f"{type(error).__name__}: {str(error)[:200]}")
            if options.device == "cuda":
                torch.cuda.empty_cache()
            continue
        for row_name, values in results.items():
            median, low, high = values["ratio"]
            row = {"case": where[0], "precision": where[1], "what": row_name, "ratio": median, "low": low, "high": high}
            report.add_row(row | {"ms": values["ms"][0], "peak MiB": peaks[row_name], "rounds": rounds})


def _seconds(function: Callable[[], Any], device: str) -> float:
    start = time.monotonic()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - start


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["bf16", "tf32"])
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=480.0, help="no new measurement starts after this time")
    parser.add_argument("--batch", type=int, default=0, help="batch size; 0 for that of each case")
    parser.add_argument("--no-checks", action="store_true", help="skip the checks")
    parser.add_argument("--no-peers", action="store_true", help="skip other software")
    parser.add_argument("--errors", action="store_true", help="also compare the large models with float64")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "benchmark-results")))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, measure, print the table and write a JSON file."""
    options = _options(arguments)
    report = Report(options.output / "gpu.json", options.seconds, options.device)
    if not options.no_checks:
        _checks(report, options.device)
    for name in options.case:
        for precision in options.precision:
            if report.left() <= 0:
                report.add_missing(f"{name}, {precision}", "out of time")
            else:
                _measured(name, precision, report, options)
    report.console.print(_table(report.content["rows"], report.content["environment"]))
    report.console.print(f"written: {report.path}")
    failed = [check["what"] for check in report.content["checks"] if not check["passed"]]
    if failed:
        sys.exit(f"failed checks: {', '.join(failed)}")


def _table(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> Table:
    caption = ", ".join(f"{key} {value}" for key, value in facts.items())
    table = Table(title="GPU: time / training step, and peak memory", caption=caption, caption_justify="left")
    for column in ("case", "precision", "measurement", "ratio", "quartiles", "ms", "peak MiB"):
        table.add_column(column, justify="left" if column in ("case", "precision", "measurement") else "right")
    for row in rows:
        quartiles = f"{row['low']:.2f} to {row['high']:.2f}"
        figures = (f"{row['ratio']:.2f}", quartiles, f"{row['ms']:.2f}", f"{row['peak MiB']:.0f}")
        table.add_row(row["case"], row["precision"], row["what"], *figures)
    return table
