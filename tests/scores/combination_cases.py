"""Rows of the test table: the combination's features by plain autograd, and its detectors by their definitions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradmetrics.scoring.totals import Tensors

Definition = Callable[[nn.Module, Tensor, Tensors], Tensor]


def head_features(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Features of the logits, and the factors of the head's gradients."""
    z, h = model(x)[0], nn.Sequential(*list(model.children())[:-1])(x)[0]
    p = z.softmax(0)
    sorted_z, one_hot = z.sort().values, F.one_hot(z.argmax(), len(z))
    quantities = [1 - p.max(), -(p * p.log()).sum(), h.abs().sum(), h.norm(), (p - one_hot).norm()]
    logs = [(quantity + 1e-20).log() for quantity in (*quantities, (p - 1 / len(z)).norm())]
    return [*logs[:2], sorted_z[-2] - sorted_z[-1], -z.exp().sum().log(), -z.max(), *logs[2:]]


def layer_features(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Logarithms of the norms of every layer's gradient: L1, L2 and the largest entry, for both objectives."""
    found = []
    names = [name for name, _ in model.named_parameters()]
    for uniform in (False, True):
        z = model(x)
        target = torch.full_like(z, 1 / z.shape[1]) if uniform else z.argmax(1)
        gradients = torch.autograd.grad(F.cross_entropy(z, target), list(model.parameters()))
        for layer in dict.fromkeys(name.split(".")[0] for name in names):
            entries = [g.flatten() for n, g in zip(names, gradients, strict=True) if n.split(".")[0] == layer]
            g = torch.cat(entries)
            found += [(g.norm(order) + 1e-20).log() for order in (1, 2, float("inf"))]
    return found


def combined(layers: bool, detect: Callable[[Tensor, Tensors], Tensor]) -> Definition:
    def definition(model: nn.Module, x: Tensor, state: Tensors) -> Tensor:
        features = torch.stack(head_features(model, x) + (layer_features(model, x) if layers else [])).detach()
        return detect((features - state["mean"]) / state["scale"], state)

    return definition


def distance(features: Tensor, state: Tensors) -> Tensor:
    centred = features - state["centre"]
    return (centred @ state["precision"] @ centred).sqrt()


def outlier_factor(features: Tensor, state: Tensors) -> Tensor:
    """One over the mean reachability distance, of the neighbours and of the sample."""
    away = (state["rows"] - features).square().sum(1).sqrt()
    nearest = away.argsort()[:20]
    density = 1 / (torch.maximum(away[nearest], state["reach"][nearest]).mean() + 1e-10)
    return state["density"][nearest].mean() / density


def probability(features: Tensor, state: Tensors) -> Tensor:
    return 1 / (1 + torch.exp(-(features * state["weight"]).sum() - state["bias"]))


FITTED: dict[str, Definition] = {
    "combination": combined(True, distance),
    "combination(target=head)": combined(False, distance),
    "combination(detector=lof)": combined(True, outlier_factor),
    "combination(detector=errors)": combined(True, probability),
    "combination(detector=ood,target=head)": combined(False, probability),
}
