"""Rows of the test table: scores of the logits with a parameter, and distances in the space of the head's input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_gradmetrics.scoring.totals import Tensors


def features(model: nn.Module, x: Tensor) -> Tensor:
    return nn.Sequential(*list(model.children())[:-1])(x)[0].detach()


def softmax(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).softmax(1)[0].detach()


def gen(gamma: float, top: int) -> Callable[[nn.Module, Tensor], Tensor]:
    def definition(model: nn.Module, x: Tensor) -> Tensor:
        p = softmax(model, x).sort(descending=True).values[:top]
        return sum(q**gamma * (1 - q) ** gamma for q in p)

    return definition


def quadratic(x: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    return (x - mean) @ precision @ (x - mean)


def nearest_class(x: Tensor, state: Tensors) -> Tensor:
    return min(quadratic(x, mean, state["precision"]) for mean in state["means"])


def relative(model: nn.Module, x: Tensor, state: Tensors) -> Tensor:
    h = features(model, x)
    return nearest_class(h, state) - quadratic(h, state["mean"][0], state["overall_precision"])


def neighbour(k: int) -> Callable[[nn.Module, Tensor, Tensors], Tensor]:
    def definition(model: nn.Module, x: Tensor, state: Tensors) -> Tensor:
        h = features(model, x)
        return (state["rows"] - h / h.norm()).norm(dim=1).sort().values[k - 1]

    return definition


def residual(h: Tensor, state: Tensors) -> Tensor:
    return ((h - state["origin"]) @ state["null_space"]).norm()


def virtual_logit(model: nn.Module, x: Tensor, state: Tensors) -> Tensor:
    return state["alpha"] * residual(features(model, x), state) - model(x)[0].exp().sum().log()


def sirc(
    error: Callable[[Tensor], Tensor], confidence: Callable[[Tensor, Tensors], Tensor]
) -> Callable[[nn.Module, Tensor, Tensors], Tensor]:
    def definition(model: nn.Module, x: Tensor, state: Tensors) -> Tensor:
        second = confidence(features(model, x), state)
        return (error(softmax(model, x)) * (1 + torch.exp(-state["b"] * (second - state["a"])))).log()

    return definition


CASES = {
    "views(n=1)": lambda m, x: 1 - softmax(m, x).max(),
    "views(n=1,score=energy)": lambda m, x: -m(x).exp().sum().log(),
    "gen": gen(0.1, 99),
    "gen(gamma=0.5,top=2)": gen(0.5, 2),
    "max_logit_pnorm": lambda m, x: -m(x).max() / m(x).norm(5),
    "max_logit_pnorm(p=2)": lambda m, x: -m(x).max() / m(x).norm(2),
}
FITTED = {
    "mahalanobis": lambda m, x, state: nearest_class(features(m, x) / features(m, x).norm(), state),
    "mahalanobis(normalise=False)": lambda m, x, state: nearest_class(features(m, x), state),
    "rmds": relative,
    "knn": neighbour(5),
    "knn(k=1)": neighbour(1),
    "vim": virtual_logit,
    "vim(dimensions=2)": virtual_logit,
    "sirc": sirc(lambda p: 1 - p.max(), lambda h, state: h.norm(1)),
    "sirc(primary=entropy,secondary=residual)": sirc(
        lambda p: -(p * p.log()).sum(), lambda h, state: -residual(h, state)
    ),
}
