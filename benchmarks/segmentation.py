"""What scores of pixels cost beside the forward pass, and how much memory their metrics need: ``python -m benchmarks segmentation``.

Times are CPU seconds of this process (all threads), so other work on the machine changes them little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.espnet import espnet
from benchmarks.measure import environment, peak_memory
from lightning_gradmetrics.pictures.pixels.metrics import PixelMeter, sampled_pixels
from lightning_gradmetrics.pictures.pixels.resampling import group_of
from lightning_gradmetrics.scores import resolve
from lightning_gradmetrics.scoring.scorer import Scorer
from lightning_gradmetrics.scoring.step import StepObserver

FIVE = ("max_softmax", "entropy", "gradnorm", "pseudo_label", "exgrad")
SIZE = (360, 480)


def scored(observer: StepObserver, model: torch.nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What the callback does in a step: observe the model's forward pass, and score its pixels."""
    with torch.no_grad(), observer.observing() as seen:
        model(images)
    scorer = observer.scorer
    return scorer(scorer.evidence(model, observer.batch(seen, images)))


def measured(scores: tuple[str, ...], rounds: int) -> Callable[[torch.nn.Module, Tensor], list[float]]:
    """Return a function that measures the scores' share of the forward pass, once per round."""

    def shares(model: torch.nn.Module, images: Tensor) -> list[float]:
        observer = StepObserver(Scorer(resolve(list(scores))), model)
        found = []
        for number in range(-2, rounds):
            alone, both = _seconds(lambda: forward(model, images)), _seconds(lambda: scored(observer, model, images))
            if number >= 0:
                found.append((both - alone) / alone)
        return found

    return shares


def forward(model: torch.nn.Module, images: Tensor) -> Tensor:
    """A forward pass without gradients."""
    with torch.no_grad():
        return model(images)


def _seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def synthetic(pixels: int, images: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Scores, errors and predicted classes of images that differ in difficulty."""
    generator = torch.Generator().manual_seed(0)
    for number in range(images):
        wrong = torch.rand(pixels, generator=generator) < 0.05 + 0.05 * (number % 5)
        yield torch.randn(pixels, generator=generator) + wrong, wrong, torch.randint(12, (pixels,), generator=generator)


def bytes_in(value: Any) -> int:
    """The bytes of all tensors that an object holds."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(bytes_in(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(bytes_in(item) for item in value)
    return bytes_in(vars(value)) if hasattr(value, "__dict__") else 0


def memory(pixels: int, images: int) -> None:
    """Print the size of a score's metrics as images are added."""
    meter, used = PixelMeter(16384, 200), sampled_pixels(torch.ones(pixels, dtype=torch.bool), "auto")
    start = time.process_time()
    print(
        f"images of {pixels:,} pixels, of which {len(used):,} are used | MiB of one score's metrics | peak MiB of the process"
    )
    for number, (scores, wrong, predicted) in enumerate(synthetic(pixels, images), 1):
        meter.add(scores[used], wrong[used], predicted[used], group_of(number, predicted))
        if number in (10, 100, 1_000, 10_000, images):
            print(f"{number:>8,} | {bytes_in(meter) / 2**20:6.1f} | {peak_memory() / 2**20:8.0f}", flush=True)
    print(
        f"{1e3 * (time.process_time() - start) / images:.1f} ms of CPU per image and score, the synthetic image included"
    )


def main(arguments: list[str] | None = None) -> None:
    """Print the cost of scores, and the size of metrics."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks segmentation", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument(
        "--pixels", type=int, default=10_000, help="of a synthetic image, for the memory of the metrics"
    )
    options = parser.parse_args(arguments)
    print(
        {name: value for name, value in environment("cpu").items() if name in ("date", "processor", "threads", "torch")}
    )
    model, images = espnet(), torch.randn(1, 3, *SIZE)
    print(f"ESPNet, {sum(p.numel() for p in model.parameters()):,} parameters, an image of {SIZE[0]} x {SIZE[1]}")
    print(
        f"forward: {1e3 * statistics.median(_seconds(lambda: forward(model, images)) for _ in range(9)):.0f} ms of CPU"
    )
    for name, scores in {**{score: (score,) for score in FIVE}, "all five": FIVE}.items():
        low, middle, high = statistics.quantiles(measured(scores, options.rounds)(model, images), n=4)
        print(f"{name}: {100 * middle:.0f} % of the forward pass ({100 * low:.0f} to {100 * high:.0f})", flush=True)
    memory(options.pixels, options.images)
