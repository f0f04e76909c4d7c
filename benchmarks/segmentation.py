"""Measure the time of pixel scores and the memory of their metrics: ``python -m benchmarks segmentation``.

Times are CPU seconds of all threads of this process, so other work on the machine has little influence. They are
compared with the forward pass.
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
from lightning_gradmetrics.scoring.registry import resolve
from lightning_gradmetrics.scoring.scorer import Scorer
from lightning_gradmetrics.scoring.step import StepObserver

FIVE = ("max_softmax", "entropy", "gradnorm", "pseudo_label", "exgrad")
SIZE = (360, 480)


def scored(observer: StepObserver, model: torch.nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Observe the model's forward pass and return the scores of its pixels, as the callback does."""
    with torch.no_grad(), observer.observing() as calls:
        model(images)
    scorer = observer.scorer
    return scorer(scorer.evidence(model, observer.batch(calls, images)))


def measured(scores: tuple[str, ...], rounds: int) -> Callable[[torch.nn.Module, Tensor], list[float]]:
    """Return a function that measures the extra time of scores, as a fraction of the forward pass per round."""

    def extra_fractions(model: torch.nn.Module, images: Tensor) -> list[float]:
        observer = StepObserver(Scorer(resolve(list(scores))), model)
        fractions = []
        for number in range(-2, rounds):
            alone, both = _seconds(lambda: forward(model, images)), _seconds(lambda: scored(observer, model, images))
            if number >= 0:
                fractions.append((both - alone) / alone)
        return fractions

    return extra_fractions


def forward(model: torch.nn.Module, images: Tensor) -> Tensor:
    """Return the logits of a forward pass without gradients."""
    with torch.no_grad():
        return model(images)


def _seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def synthetic(pixels: int, images: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the scores, errors and predicted classes of images whose error rate varies."""
    generator = torch.Generator().manual_seed(0)
    for number in range(images):
        wrong = torch.rand(pixels, generator=generator) < 0.05 + 0.05 * (number % 5)
        yield torch.randn(pixels, generator=generator) + wrong, wrong, torch.randint(12, (pixels,), generator=generator)


def bytes_in(value: Any) -> int:
    """Return the number of bytes of all tensors in an object."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(bytes_in(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(bytes_in(item) for item in value)
    return bytes_in(vars(value)) if hasattr(value, "__dict__") else 0


def memory(pixels: int, images: int) -> None:
    """Print the memory of one score's metrics for a growing number of images."""
    meter, used = PixelMeter(16384, 200), sampled_pixels(torch.ones(pixels, dtype=torch.bool), "auto")
    start = time.process_time()
    print(f"images ({len(used):,} of {pixels:,} pixels used) | MiB of one score's metrics | peak MiB of the process")
    for number, (scores, wrong, predicted) in enumerate(synthetic(pixels, images), 1):
        meter.add(scores[used], wrong[used], predicted[used], group_of(number, predicted))
        if number in (10, 100, 1_000, 10_000, images):
            print(f"{number:>8,} | {bytes_in(meter) / 2**20:6.1f} | {peak_memory() / 2**20:8.0f}", flush=True)
    print(
        f"{1e3 * (time.process_time() - start) / images:.1f} ms of CPU per image and score, including the generation of the image"
    )


def main(arguments: list[str] | None = None) -> None:
    """Print the time of scores, and the memory of metrics."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks segmentation", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--pixels", type=int, default=10_000, help="pixels per synthetic image")
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
