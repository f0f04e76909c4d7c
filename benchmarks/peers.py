"""A training step and other software, with which the engine is compared."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import lightning_gradmetrics as lgm

__all__ = [
    "FULL",
    "SMALL",
    "SQUARES",
    "backpack_norms",
    "gradient_metrics_seconds",
    "lgm_engine",
    "opacus_norms",
    "pytorch_ood",
    "training_step",
    "vmap_grad",
]

FULL = ("max", "min", "mean", "std", "l1", "l2")
SQUARES = ("mean", "std", "l2")


def training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return a function that runs the forward and backward pass of one batch, without an optimiser."""
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x).float(), labels).backward()

    return step


def lgm_engine(model: nn.Module, x: Tensor, statistics: tuple[str, ...], compiled: bool = False) -> Callable[[], Any]:
    """Return a function that runs the engine of this package, with a compiled plan if ``compiled`` is set."""
    return lambda: lgm.gradient_statistics(model, x, "pseudo_label", statistics=statistics, compile=compiled)


def vmap_grad(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Return a function that runs ``vmap(grad)`` on the whole batch, then the fastest torch reductions."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        logits = functional_call(model, {**values, **buffers}, (sample[None],))
        return F.cross_entropy(logits, logits.detach().argmax(1))

    def run() -> list[Tensor]:
        gradients = [g.flatten(1) for g in vmap(grad(loss), (None, 0), randomness="same")(parameters, x).values()]
        high = torch.stack([g.amax(1) for g in gradients]).amax(0)
        low = torch.stack([g.amin(1) for g in gradients]).amin(0)
        sums = [sum(f(g) for g in gradients) for f in (_total, _absolute, _square)]
        return [high, low, *sums]

    return run


def _total(g: Tensor) -> Tensor:
    return g.sum(1)


def _absolute(g: Tensor) -> Tensor:
    return g.abs().sum(1)


def _square(g: Tensor) -> Tensor:
    return torch.linalg.vecdot(g, g)


def pytorch_ood(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Return a function that runs pytorch-ood's GradUncertainty: ``vmap(grad)`` and a sum of squares."""
    from pytorch_ood.detector import GradUncertainty

    detector = GradUncertainty(model)
    return lambda: detector.predict(x)


def gradient_metrics_seconds(model: nn.Module, x: Tensor, samples: int) -> float:
    """Return the seconds that gradient_metrics takes for a batch.

    It runs one forward pass, and one backward pass per sample through the graph of the whole batch. The backward passes
    are timed on ``samples`` samples and scaled to the batch.
    """
    from gradient_metrics import GradientMetricCollector
    from gradient_metrics.metrics import Max, MeanStd, Min, PNorm

    metrics = [Max(model), Min(model), MeanStd(model), PNorm(model, p=1), PNorm(model, p=2)]
    collector = GradientMetricCollector(metrics)
    start = time.perf_counter()
    logits = model(x)
    losses = F.cross_entropy(logits, logits.argmax(1), reduction="none")
    forward = time.perf_counter() - start
    start = time.perf_counter()
    collector(losses[:samples])
    return forward + (time.perf_counter() - start) * len(x) / min(samples, len(x))


def opacus_norms(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Return a function that computes per-sample gradient norms with Opacus' ghost clipping.

    Opacus adds hooks and attributes to the model, so it gets a copy. Its hooks record only in train mode. It refuses
    batch norms, so train mode does not change the results of models without dropout.
    """
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        deepcopy(model).train(), use_ghost_clipping=True, loss_reduction="sum", strict=False
    )

    def run() -> Tensor:
        logits = wrapped(x)
        F.cross_entropy(logits, logits.detach().argmax(1), reduction="sum").backward()
        norms: Tensor = wrapped.get_norm_sample()
        wrapped.zero_grad(set_to_none=True)
        return norms

    return run


def backpack_norms(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Return a function that computes per-sample gradient norms with BackPACK."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    extended, criterion = extend(deepcopy(model)), extend(nn.CrossEntropyLoss(reduction="sum"))

    def run() -> Tensor:
        logits = extended(x)
        loss = criterion(logits, logits.detach().argmax(1))
        with backpack(BatchL2Grad()):
            loss.backward()
        squares = torch.stack([p.batch_l2 for p in extended.parameters()])
        extended.zero_grad(set_to_none=True)
        return squares.sum(0).sqrt()

    return run


SMALL: dict[str, Callable[[nn.Module, Tensor], Callable[[], Any]]] = {
    "vmap(grad), all six": vmap_grad,
    "pytorch-ood, L2": pytorch_ood,
    "Opacus, L2": opacus_norms,
    "BackPACK, L2": backpack_norms,
}
"""Other software for batches of small models, by name and computed statistics."""
