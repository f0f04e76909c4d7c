"""Small models that tests share, by name: each with a maker of inputs ``(N, ...)``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn


def fast_rows(rows: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """Return the rows of a parametrised test; all rows are marked slow, apart from those in ``fast``."""
    return [row if row in fast else pytest.param(row, marks=pytest.mark.slow) for row in rows]


def cnn(classes: int = 5) -> nn.Module:
    """Convolutions, batch norm with running statistics that are not the default, in-place ReLU, a head."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    )
    with torch.no_grad():
        model[1].running_mean.normal_()  # type: ignore[union-attr,operator]
        model[1].running_var.uniform_(0.5, 2)  # type: ignore[union-attr,operator]
    return model.eval()


def mlp(classes: int = 5) -> nn.Module:
    """Two linear layers, the head without bias."""
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, classes, bias=False)).eval()


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 8, 8)


def vectors(n: int) -> Tensor:
    return torch.randn(n, 7)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "cnn": (cnn, images),
    "mlp": (mlp, vectors),
}


FORWARDS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""The number of forward passes of each module; kept outside, because scoring restores what a module contains."""


class Module(LightningModule):
    """A user's LightningModule: a network, a forward, and steps that call it."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network or cnn()
        FORWARDS[self] = 0

    @property
    def forwards(self) -> int:
        """The number of forward passes so far."""
        return FORWARDS[self]

    def forward(self, x: Tensor) -> Tensor:
        FORWARDS[self] = FORWARDS.get(self, 0) + 1
        return self.network(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: object, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.loss(batch)

    def test_step(self, batch: object, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.loss(batch)

    def predict_step(self, batch: object, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self(batch[0] if isinstance(batch, (list, tuple)) else batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def state_of(model: nn.Module) -> dict[str, object]:
    """Return the state of a model that must not change."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "random": torch.get_rng_state().clone(),
    }


def assert_same_state(before: dict[str, object], model: nn.Module) -> None:
    """Assert that the model is in the state ``before``."""
    after = state_of(model)
    assert before.keys() == after.keys()
    for key in ("requires_grad", "training", "hooks"):
        assert before[key] == after[key], key
    assert torch.equal(before["random"], after["random"])  # type: ignore[arg-type]
    for name, value in before["state"].items():  # type: ignore[attr-defined]
        assert torch.equal(value, after["state"][name]), name  # type: ignore[index]
    for old, new in zip(before["grad"], after["grad"], strict=True):  # type: ignore[call-overload]
        assert (old is None) == (new is None) and (old is None or torch.equal(old, new))
