"""The engine on a GPU: ResNet-50, ViT-S/16 and BERT-base beside a training step, ``vmap(grad)`` and pytorch-ood.

The script takes at most ``--minutes``; what it could not reach is listed as not run. Every figure is a ratio to a
training step of the same process, and every model is first checked against one sample at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lightning_gradmetrics as lgm
from benchmarks import peers
from benchmarks.measure import environment, interleaved, summary

__all__ = ["main"]

PRECISIONS = ("tf32", "bf16", "float32")
ENGINE = {"all six": peers.FULL, "L2": ("l2",)}
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
    nn.init.normal_(model.heads.head.weight, std=0.02)  # zero at the start, where every gradient below it is zero
    return model


@dataclass(frozen=True)
class Case:
    """A model and its batch.

    Args:
        model: Builds the model.
        shape: The batch's shape.
        tokens: Number of token ids; 0 for images.
    """

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: int = 0

    def build(self, device: str) -> tuple[nn.Module, Tensor]:
        """The model in eval mode and a batch; the same each time."""
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


@contextlib.contextmanager
def _precision(name: str, device: str) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        with torch.autocast(device, torch.bfloat16, enabled=name == "bf16"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def largest_error(model: nn.Module, batch: Tensor, precision: str, device: str) -> dict[str, float]:
    """Largest relative error of each statistic on two samples, against one sample at a time in float64."""
    few = batch[:2]
    with _precision(precision, device):
        measured = lgm.gradient_statistics(model, few, "pseudo_label", statistics=peers.FULL)
    exact_model, exact_input = model.double(), few.double() if few.is_floating_point() else few
    exact = lgm.gradient_statistics(exact_model, exact_input, "pseudo_label", statistics=peers.FULL, engine="reference")
    model.float()
    errors = {}
    for name in peers.FULL:
        truth = exact.statistic(name)
        errors[name] = float(((measured.statistic(name).double() - truth).abs() / truth.abs()).max())
    return errors


def _peak(function: Callable[[], Any], device: str) -> float:
    """Peak memory in MiB beyond what was held before the call."""
    if device != "cuda":
        return 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return float((torch.cuda.max_memory_allocated() - before) / 2**20)


def _functions(model: nn.Module, batch: Tensor) -> dict[str, Callable[[], Any]]:
    functions: dict[str, Callable[[], Any]] = {"training step": peers.training_step(model, batch)}
    for name, statistics in ENGINE.items():
        functions[name] = peers.lgm_engine(model, batch, statistics)
    return functions


def _measured(
    functions: Mapping[str, Callable[[], Any]], rounds: int, device: str, console: Console
) -> dict[str, dict[str, Any]]:
    """Ratios to the training step and peaks, for the functions that run; others are reported with their error."""
    running: dict[str, Callable[[], Any]] = {}
    peaks: dict[str, float] = {}
    for name, function in functions.items():
        try:
            function()
            peaks[name] = _peak(function, device)
            running[name] = function
        except Exception as error:
            console.print(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            torch.cuda.empty_cache()
    results = summary(interleaved(running, rounds, device), "training step")
    for name, peak in peaks.items():
        results[name]["peak"] = peak
    return results


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["tf32", "bf16"])
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--batch", type=int, default=0, help="another batch size; 0 keeps each case's")
    parser.add_argument("--no-peers", action="store_true", help="the engine alone")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write a JSON file."""
    options = _options(arguments)
    console, end = Console(width=150), time.monotonic() + 60 * options.minutes
    facts, rows = environment(options.device), []
    for name in options.case:
        for precision in options.precision:
            if time.monotonic() > end:
                console.print(f"not run, out of time: {name}, {precision}")
                continue
            rows += _case(name, precision, options, console, end)
    console.print(_table(rows, facts))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "gpu.json"
    path.write_text(json.dumps({"environment": facts, "rows": rows}, indent=2) + "\n")
    console.print(f"written: {path}")


def _case(name: str, precision: str, options: argparse.Namespace, console: Console, end: float) -> list[dict[str, Any]]:
    model, batch = CASES[name].build(options.device)
    batch = batch[: options.batch] if options.batch else batch
    started = time.monotonic()
    errors = largest_error(model, batch, precision, options.device)
    with _precision(precision, options.device):
        functions = _functions(model, batch)
        results = _measured(functions, options.rounds, options.device, console)
        if not options.no_peers and time.monotonic() < end:
            for peer, build in PEERS.items():
                try:
                    function = build(model, batch)
                except ImportError as error:
                    console.print(f"{peer}: not run: {error}")
                    continue
                pair = {"training step": functions["training step"], peer: function}
                measured = _measured(pair, 3, options.device, console)
                results |= {name: values for name, values in measured.items() if name == peer}
    model.zero_grad(set_to_none=True)
    rows = []
    for what, values in results.items():
        median, low, high = values["ratio"]
        row = {"case": name, "precision": precision, "what": what, "ratio": median, "low": low, "high": high}
        rows.append(row | {"ms": values["ms"][0], "peak MiB": values["peak"], "errors": errors})
    console.print(f"{name}, {precision}: {time.monotonic() - started:.0f} s; largest errors {_short(errors)}")
    for row in rows:
        console.print(
            f"  {row['what']:>22} {row['ratio']:6.2f} ({row['low']:.2f} to {row['high']:.2f}) {row['ms']:8.2f} ms"
        )
    sys.stdout.flush()
    return rows


def _short(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in errors.items())


def _table(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> Table:
    caption = ", ".join(f"{key} {value}" for key, value in facts.items())
    table = Table(title="GPU: time over a training step, and peak memory", caption=caption, caption_justify="left")
    for column in ("case", "precision", "what", "ratio", "quartiles", "ms", "peak MiB"):
        table.add_column(column, justify="left" if column in ("case", "precision", "what") else "right")
    for row in rows:
        quartiles = f"{row['low']:.2f} to {row['high']:.2f}"
        figures = (f"{row['ratio']:.2f}", quartiles, f"{row['ms']:.2f}", f"{row['peak MiB']:.0f}")
        table.add_row(row["case"], row["precision"], row["what"], *figures)
    return table
