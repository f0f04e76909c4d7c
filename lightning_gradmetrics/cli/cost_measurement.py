"""Measures the time and memory of every score on one batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import Inputs, batch_size, call, preserved
from lightning_gradmetrics.scores import Score
from lightning_gradmetrics.scoring.scorer import Scorer
from lightning_gradmetrics.scoring.step import observed

__all__ = ["score_costs"]

Record = dict[str, Any]


def score_costs(
    model: nn.Module,
    inputs: Inputs,
    labels: Tensor | None,
    scores: Iterable[Score],
    repeats: int = 7,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Record]:
    """Return the time and memory of each score on one batch, compared with a plain prediction of that batch.

    A score is timed together with the prediction that it needs. Each repeat times a plain prediction, then the score,
    and computes their ratio, so that other load on the machine affects both. The first call, which plans and compiles,
    is not timed.

    Args:
        model: A classifier in eval mode; it is left unchanged.
        inputs: A batch ``(N, ...)`` on the model's device.
        labels: Its true labels ``(N,)``, for scores that need them.
        scores: The scores; fitted scores need their state.
        repeats: The number of timed calls; the result is their median.
        progress: Called with each score's name before it is measured.

    Returns:
        One dict per score: ``score``; ``milliseconds`` per sample, prediction included; ``predictions``, the same in
        units of a plain prediction; ``extra_mib``, the peak of the memory that torch allocates, in MiB above that of a
        plain prediction.

    Raises:
        ValueError: If the batch has no samples.

    Example:
        >>> from lightning_gradmetrics.scoring.registry import make
        >>> model = nn.Sequential(nn.Linear(4, 3)).eval()
        >>> [record] = score_costs(model, torch.randn(8, 4), None, [make("entropy")], repeats=1)
        >>> sorted(record)
        ['extra_mib', 'milliseconds', 'predictions', 'score']
    """
    size = batch_size(inputs)
    if not size:
        raise ValueError("costs need a batch of at least 1 sample, got an empty one")

    def predict() -> None:
        with preserved(model), torch.no_grad():
            call(model, inputs)

    predict()
    base, records = _peak(predict, model), []
    for score in scores:
        progress(score.name)
        run = _run_of(model, inputs, labels, score)
        run()
        seconds, predictions = [], []
        for _ in range(repeats):
            plain_seconds = _seconds(predict, model)
            seconds.append(_seconds(run, model))
            predictions.append(seconds[-1] / plain_seconds)
        records.append(
            {
                "score": score.name,
                "milliseconds": 1e3 * statistics.median(seconds) / size,
                "predictions": statistics.median(predictions),
                "extra_mib": max(0, _peak(run, model) - base) / 2**20,
            }
        )
    return records


def _run_of(model: nn.Module, inputs: Inputs, labels: Tensor | None, score: Score) -> Callable[[], None]:
    scorer = Scorer((score,))

    def run() -> None:
        scorer(scorer.evidence(model, observed(scorer, model, inputs, labels)))

    return run


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _seconds(run: Callable[[], None], model: nn.Module) -> float:
    wait = torch.cuda.synchronize if _device(model).type == "cuda" else nullcontext
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def _peak(run: Callable[[], None], model: nn.Module) -> int:
    """Return the peak of the memory that torch allocates during a call, in bytes above the level before the call."""
    if _device(model).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in sorted(profile.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
