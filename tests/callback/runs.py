"""Small modules, loaders and trainers that the tests of the callback share."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradmetrics as lgm


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    """A trainer that prints and writes nothing."""
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, **options})


def test_run(callback: lgm.GradientMetrics, module: LightningModule, data: Any, **options: Any) -> Trainer:
    """The trainer after ``test``."""
    used = trainer(callback, **options)
    used.test(module, data, verbose=False)
    return used


test_run.__test__ = False  # type: ignore[attr-defined]


def column(callback: lgm.GradientMetrics, name: str) -> Tensor:
    """A column of the results."""
    return torch.tensor(callback.results[name].to_pylist(), dtype=torch.float64)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with a tanh between them, in float64 and eval mode."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double().eval()


def numbers(*shape: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64)


def batches(*tensors: Tensor, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    """Batches of four, in order."""
    return DataLoader(TensorDataset(*tensors), batch_size, **options)


def assert_scores(callback: lgm.GradientMetrics, model: nn.Module, x: Tensor, names: list[str]) -> None:
    """Assert that the results are the model's scores of these inputs."""
    for name, values in lgm.score(model, x, names).items():
        torch.testing.assert_close(column(callback, name), values, rtol=1e-9, atol=1e-12)


class Stepped(LightningModule):
    """A module whose steps all call ``step``, which the tests override."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)

    def step(self, batch: Any) -> Any:
        return self(batch[0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> int:  # type: ignore[override]
        self.step(batch)
        return 0

    test_step = predict_step = validation_step  # type: ignore[assignment]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Stopping(Stepped):
    """A small classifier that counts the samples of its steps, and fails in the step after a number of them."""

    def __init__(self, stop_at: int | None = None, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(mlp(4, 6, 3).float())
        self.stop_at, self.seen = stop_at, 0

    def step(self, batch: Any) -> Tensor:
        if self.stop_at is not None and self.seen >= self.stop_at:
            raise RuntimeError("the machine is on fire")
        self.seen += len(batch[0])
        return super().step(batch)
