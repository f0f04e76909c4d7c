"""Runs over random images, and a module that returns its batch, which the tests of the callback share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradmetrics as lgm
from tests.callback.runs import trainer
from tests.models import cnn, images

STAGES = ["validate", "test", "predict"]


def loader(
    n: int = 10, batch_size: int = 4, labels: bool = True, inputs: torch.Tensor | None = None, **options: Any
) -> DataLoader[Any]:
    x = images(n) if inputs is None else inputs
    y = torch.randint(0, 5, (len(x),))
    return DataLoader(TensorDataset(x, y) if labels else TensorDataset(x), batch_size, **options)


def run(stage: str, callback: lgm.GradientMetrics, model: LightningModule, loaders: Any, **options: Any) -> Trainer:
    used = trainer(callback, **options)
    getattr(used, stage)(model, loaders)
    return used


def scores_of(callback: lgm.GradientMetrics, name: str) -> torch.Tensor:
    return torch.tensor(callback.results.column(name).to_pylist())


class Answer(LightningModule):
    """A user's module with its own format of batches and outputs."""

    def __init__(self, take: Callable[[Any], Any], answer: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.network, self.take, self.answer = cnn(), take, answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(self.network(args[0] if args else kwargs["image"]))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self(self.take(batch))

    predict_step = test_step
