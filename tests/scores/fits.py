"""Fits the scores of the test table that need a fit, on small synthetic data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lightning_gradmetrics as lgm
from lightning_gradmetrics.scores import FittedScore, Score
from lightning_gradmetrics.scoring.registry import make

ROWS = 40


def fit_batches(model: nn.Module, make_inputs: Callable[[int], Tensor]) -> tuple[list[Any], list[Any]]:
    """Labelled samples of every class, the less certain half predicted incorrectly; and others, three times as large."""
    first = next(model.parameters())
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        inside, outside = make_inputs(ROWS).to(first.dtype), 3 * make_inputs(ROWS).to(first.dtype)
        logits = model(inside)
    confidence = logits.softmax(1).amax(1)
    labels = (logits.argmax(1) + (confidence < confidence.median())) % logits.shape[1]
    labels[: logits.shape[1]] = torch.arange(logits.shape[1])
    return [(inside, labels)], [(outside, torch.full((ROWS,), -1))]


def labels_of(inputs: Tensor) -> Tensor:
    """A label from 0 to 3 that goes with each sample, whatever its batch and precision."""
    last = inputs.flatten(1)[:, -2:] > 0
    return 2 * last[:, 0].long() + last[:, 1].long()


def ready(case: str, model: nn.Module, make_inputs: Callable[[int], Tensor]) -> Score:
    """The score of that name, fitted for the model where it needs a fit."""
    score = make(case)
    if not isinstance(score, FittedScore):
        return score
    inside, outside = fit_batches(model, make_inputs)
    return lgm.fit(model, inside, score, ood=outside)[0]
