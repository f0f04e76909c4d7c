"""Rows of the test table: scores of the logits with a parameter, and distances in the space of the head's input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_gradmetrics.scores.activation_coverage import interval_edges
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


def layer_inputs(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """What each convolution and linear layer receives, with the channels first."""
    found = []
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            found.append(x[0].flatten(1) if x.ndim == 4 else x[0][:, None])
        x = layer(x)
    return found


def trust(model: nn.Sequential, x: Tensor, state: Tensors) -> Tensor:
    columns = []
    for given in layer_inputs(model, x):
        columns += [given.mean(1), given.std(1, correction=0)]
    row = (torch.cat(columns) - state["centre"]) / state["scale"]
    distance = quadratic(row, torch.zeros_like(row), state["precision"]).log()
    z = model(x)[0]
    p = z.softmax(0).max()
    error = ((1 - p) / p).log()
    energy = (-z.exp().sum().log() - state["energy_mean"]) / state["energy_spread"]
    return error + energy + 2 * (1 + ((distance - state["quantile"]) / state["distance_spread"]).exp()).log()


def from_channels(model: nn.Sequential, x: Tensor, state: Tensors) -> Tensor:
    columns = []
    for given in layer_inputs(model, x):
        columns += [given.mean(1), given.std(1, correction=0)]
    row = (torch.cat(columns) - state["centre"]) / state["scale"]
    return quadratic(row, torch.zeros_like(row), state["precision"])


def to_prototype(model: nn.Module, x: Tensor, state: Tensors) -> Tensor:
    """GROOD by autograd: the gradient of the loss of negative distances with respect to the last prototype."""
    noise = state["noise"].clone().requires_grad_()
    distances = (features(model, x) - torch.cat([state["prototypes"], noise[None]])).norm(dim=1)
    loss = nn.functional.cross_entropy(-distances[None], model(x).argmax(1))
    (gradient,) = torch.autograd.grad(loss, noise)
    return (state["rows"] - gradient).norm(dim=1).min()


def to_mean_gradient(model: nn.Module, x: Tensor, state: Tensors) -> Tensor:
    z = model(x)
    head = list(model.children())[-1]
    assert isinstance(head, nn.Linear)
    (whole,) = torch.autograd.grad(nn.functional.cross_entropy(z, z.argmax(1)), head.weight)
    return -nn.functional.cosine_similarity(whole.flatten(), state["references"][z.argmax()].flatten(), 0)


def not_zero(model: nn.Sequential, x: Tensor) -> Tensor:
    """GAIA-Z: the network as a chain, and the gradient of the largest logit at each normalisation or weighted layer."""
    kinds: tuple[type[nn.Module], ...] = (
        (nn.BatchNorm2d,) if any(isinstance(m, nn.BatchNorm2d) for m in model) else (nn.Conv2d, nn.Linear)
    )
    shares = []
    for place, layer in enumerate(model):
        if isinstance(layer, kinds):
            out = model[: place + 1](x).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(model[place + 1 :](out.clone()).max(), out)
            shares.append((gradient[0] != 0).double().reshape(gradient.shape[1], -1).mean(1))
    return torch.cat(shares).square().mean()


def average(model: nn.Sequential, x: Tensor) -> Tensor:
    """GAIA-A: the mean gradients of the sum of the head's input, over those of all log-probabilities by autograd."""
    kinds: tuple[type[nn.Module], ...] = (
        (nn.BatchNorm2d,) if any(isinstance(m, nn.BatchNorm2d) for m in model) else (nn.Conv2d, nn.Linear)
    )
    inner = []
    for place, layer in enumerate(model[:-1]):
        if isinstance(layer, kinds):
            out = model[: place + 1](x).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(model[place + 1 : -1](out.clone()).sum(), out)
            inner.append(gradient[0].reshape(gradient.shape[1], -1).mean(1))
    h = features(model, x).requires_grad_()
    (outer,) = torch.autograd.grad(model[-1](h).log_softmax(0).sum(), h)
    return torch.cat(inner).square().mean() / outer.abs().mean()


def covered(model: nn.Sequential, place: int, x: Tensor, counts: Tensor, bins: int) -> Tensor:
    """The mean coverage of one layer's channels, each interval searched for."""
    out = model[: place + 1](x).detach().requires_grad_()
    z = model[place + 1 :](out.clone())
    (slope,) = torch.autograd.grad(-z.log_softmax(1).mean(), out)
    channels = out.shape[1]
    products = out[0].reshape(channels, -1).sum(1) * slope[0].reshape(channels, -1).sum(1)
    edges, total = interval_edges(bins), 0.0
    for channel, state in enumerate(torch.sigmoid(100 * products)):
        for interval in range(bins - 1):
            if edges[interval] <= state < edges[interval + 1]:
                total += float(counts[channel, interval])
    return torch.tensor(-total / channels, dtype=torch.float64)


def coverage_before_head(model: nn.Sequential, x: Tensor, state: Tensors) -> Tensor:
    return covered(model, len(model) - 2, x, state["coverage"], 50)


def coverage_of_all_layers(model: nn.Sequential, x: Tensor, state: Tensors) -> Tensor:
    total, first = torch.zeros((), dtype=torch.float64), 0
    for place in range(len(model)):
        channels = model[: place + 1](x).shape[1]
        total += covered(model, place, x, state["coverage"][first : first + channels], 10) / len(model)
        first += channels
    return total


def published(p: float, one_hot: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    """PGN by its code: the softmax without the predicted class, or all of it times (C - 1) / C, and the head's input."""

    def definition(model: nn.Module, x: Tensor) -> Tensor:
        q = softmax(model, x)
        first = [value for c, value in enumerate(q) if c != q.argmax()] if one_hot else list(q * (len(q) - 1) / len(q))
        return torch.stack(first).norm(p) * features(model, x).norm(p)

    return definition


CASES = {
    "pgn": published(0.5, False),
    "pgn(p=2,label=one_hot)": published(2, True),
    "views(n=1)": lambda m, x: 1 - softmax(m, x).max(),
    "views(n=1,score=energy)": lambda m, x: -m(x).exp().sum().log(),
    "gaia": not_zero,
    "gaia(form=average)": average,
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
    "grood": to_prototype,
    "nac_ue(fill=4)": coverage_before_head,
    "nac_ue(bins=10,fill=30,layers='*')": coverage_of_all_layers,
    "gradient_cosine": to_mean_gradient,
    "trust": trust,
    "channel_distance": from_channels,
    "vim": virtual_logit,
    "vim(dimensions=2)": virtual_logit,
    "sirc": sirc(lambda p: 1 - p.max(), lambda h, state: h.norm(1)),
    "sirc(primary=entropy,secondary=residual)": sirc(
        lambda p: -(p * p.log()).sum(), lambda h, state: -residual(h, state)
    ),
}
