"""Compare the engine and the callback on a device with autograd, one sample at a time in float64."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_gradmetrics as lgm
from lightning_gradmetrics.gradients.statistics import GradientStatistics

__all__ = ["MODELS", "callback_check", "engine_check", "precision_of"]

STATISTICS = ("max", "min", "mean", "std", "l1", "l2")
SINGLE_LIMIT = 1e-4
"""Largest allowed error in float32, relative to the L2 norm of the gradient (or the L1 norm, for sums)."""

HALF_LIMIT = 0.05
"""In bfloat16, the engine's relative error may be at most twice the error of autograd, plus this margin."""

SAMPLES = 6


class _Words(nn.Module):
    """An embedding and an embedding bag, followed by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bag, self.head = nn.Embedding(50, 16), nn.EmbeddingBag(50, 16), nn.Linear(32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.cat([self.table(tokens).mean(1), self.bag(tokens)], 1))
        return logits


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.LSTM(8, 24, 2, batch_first=True), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(x)[0][:, -1])
        return logits


def _cnn() -> nn.Module:
    first = [nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()]
    depthwise = [nn.Conv2d(24, 24, 3, 2, 1, groups=24, bias=False), nn.GroupNorm(4, 24), nn.SiLU()]
    last = [nn.Conv2d(24, 40, 3, 2, 1, groups=2), nn.BatchNorm2d(40), nn.ReLU()]
    return nn.Sequential(*first, *depthwise, *last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 5))


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(16, 4, 1, 2, 32, 64, num_classes=5)
    nn.init.normal_(model.heads.head.weight, std=0.2)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "CNN": (_cnn, (SAMPLES, 3, 16, 16)),
    "ViT block": (_vit, (SAMPLES, 3, 16, 16)),
    "embeddings": (_Words, (SAMPLES, 12)),
    "LSTM": (_Recurrent, (SAMPLES, 9, 8)),
}
"""Functions that build the models, and the shapes of their batches."""


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Args:
        what: Name of the check.
        passed: Whether the error is within its limit.
        error: The largest error.
        note: The reason of a failure, or further details.
        seconds: Duration of the check.
    """

    what: str
    passed: bool
    error: float
    note: str
    seconds: float


@contextlib.contextmanager
def precision_of(name: str, device: str) -> Iterator[None]:
    """Compute in ``float32``, ``tf32`` or ``bf16`` (autocast) inside the block."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        with torch.autocast(device, torch.bfloat16, enabled=name == "bf16"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _built(name: str, device: str) -> tuple[nn.Module, Tensor]:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    batch = torch.randint(50, shape) if name == "embeddings" else torch.randn(shape)
    return model.to(device), batch.to(device)


def _by_autograd(model: nn.Module, batch: Tensor) -> GradientStatistics:
    """Return the statistics of each parameter's gradient, from one backward pass per sample."""
    parameters = dict(model.named_parameters())
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    with torch.backends.cudnn.flags(enabled=False):  # recurrent layers of cuDNN have no backward pass in eval mode
        for sample in batch.split(1):
            logits = model(sample)
            loss = F.cross_entropy(logits.to(torch.float64), logits.argmax(1))
            for name, gradient in zip(rows, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                rows[name].append(gradient.double())
    return GradientStatistics.of({name: torch.stack(g) for name, g in rows.items()}, STATISTICS, per_parameter=True)


def _error(measured: GradientStatistics, exact: GradientStatistics) -> float:
    """Return the largest error of all statistics, relative to a norm of the gradient."""
    l1, l2, count = exact.norm(1), exact.norm(2), exact.count.to(exact.norm(2).device)
    scales = {"mean": l1 / count, "l1": l1, "std": l2 / (count - 1).clamp(min=1).sqrt()}
    worst = 0.0
    for name in STATISTICS:
        error = (measured.statistic(name).double() - exact.statistic(name)).abs() / scales.get(name, l2)
        worst = max(worst, float(error.nan_to_num(nan=torch.inf).max()))
    return worst


def _is_about_speed(message: str) -> bool:
    return "no fast rule" in message or "is not compiled" in message


def engine_check(name: str, precision: str, device: str) -> Check:
    """Compare the engine with autograd on one model: a first and a second call, and two calls with a compiled plan."""
    start = time.monotonic()
    model, batch = _built(name, device)
    double_model = deepcopy(model).double()
    exact = _by_autograd(double_model, batch.double() if batch.is_floating_point() else batch)
    limit, autograd_error = SINGLE_LIMIT, 0.0
    with precision_of(precision, device), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if precision == "bf16":
            autograd_error = _error(_by_autograd(model, batch), exact)
            limit = 2 * autograd_error + HALF_LIMIT
        worst = 0.0
        for compiled in (False, False, True, True):
            measured = lgm.gradient_statistics(
                model, batch, "pseudo_label", per_parameter=True, statistics=STATISTICS, compile=compiled
            )
            worst = max(worst, _error(measured, exact))
    slow = [str(warning.message)[:160] for warning in caught if _is_about_speed(str(warning.message))]
    note = slow[0] if slow else (f"error of autograd {autograd_error:.1e}" if autograd_error else "")
    return Check(f"{name}, {precision}", worst <= limit and not slow, worst, note, time.monotonic() - start)


SCORES = ("max_softmax", "entropy", "gradnorm", "gradtrust", "pseudo_label")


def callback_check(device: str) -> Check:
    """Compare the callback's scores on the device with those of a float64 model on the CPU."""
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader, TensorDataset

    class Module(LightningModule):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.network(x)
            return logits

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0])

    start = time.monotonic()
    network, batch = _built("CNN", "cpu")
    expected = lgm.score(deepcopy(network).double(), batch.double(), SCORES)
    callback = lgm.GradientMetrics(scores=SCORES)
    options: Mapping[str, Any] = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False
    )
    trainer = Trainer(accelerator="gpu" if device == "cuda" else device, devices=1, callbacks=[callback], **options)
    with precision_of("float32", device):
        trainer.predict(Module(network), DataLoader(TensorDataset(batch), 3), return_predictions=False)
    worst = 0.0
    for name in SCORES:
        column = torch.tensor(callback.results.column(name).to_pylist(), dtype=torch.float64)
        error = (column - expected[name].double()).abs().max() / expected[name].double().abs().max()
        worst = max(worst, float(error))
    return Check("callback in a Trainer", worst <= 1e-3, worst, "", time.monotonic() - start)
