"""The description of a run that is compared when it is resumed."""

from __future__ import annotations

from pathlib import Path

import torch

import lightning_gradmetrics as lgm
from lightning_gradmetrics.callback.describing import describe_score, described
from lightning_gradmetrics.scores import load_fitted, save_fitted
from lightning_gradmetrics.scoring.registry import resolve


def test_two_lambdas_of_one_function_differ() -> None:
    first, same, other = (lambda batch: batch[0]), (lambda batch: batch[0]), (lambda batch: batch[1])
    assert first.__qualname__ == other.__qualname__
    assert described(first) == described(same) != described(other)


def test_named_functions_are_described_by_name() -> None:
    assert described(len) == "len" and described([len, 2.0]) == ["len", 2.0]


def test_a_state_that_was_saved_and_loaded_has_the_same_description(tmp_path: Path) -> None:
    """A file stores tensors in the order of their names."""
    model, images, labels = torch.nn.Linear(4, 3), torch.randn(30, 4), torch.arange(30) % 3
    fitted = lgm.fit(model, [(images, labels)], ["rmds", "vim", "sirc"])
    save_fitted(fitted, tmp_path)
    loaded = load_fitted(resolve(["rmds", "vim", "sirc"]), tmp_path, model)
    assert list(map(describe_score, loaded)) == list(map(describe_score, fitted))
