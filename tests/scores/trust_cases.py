"""Definitions, one sample at a time, of geometric gradient analysis and of GradTrust with its comparison scores."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def head_gradient(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient of a loss of the logits with respect to the head's weight, ``(C, D)``."""
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    return torch.autograd.grad(loss(model(x)), head.weight)[0]


def trust(model: nn.Module, x: Tensor, k: int | None = None) -> Tensor:
    """The demo: squared error to 1/C; each class row's variance of the squared gradient; largest over mean."""
    z = model(x)
    gradient = head_gradient(model, x, lambda z: nn.MSELoss()(z, torch.full_like(z, 1 / z.shape[1])))
    variance = gradient.square().var(1)[z[0].topk(k or z.shape[1]).indices]
    return -(variance.max() / variance.mean())


def grad_norm(model: nn.Module, x: Tensor) -> Tensor:
    """The demo: the uniform distribution as the input of the divergence, the prediction as its target."""

    def loss(z: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # reduction "mean" is not the mathematical divergence
            return nn.KLDivLoss()(torch.full_like(z, 1 / z.shape[1]), F.softmax(z, dim=1))

    return head_gradient(model, x, loss).norm(2)


def odin(model: nn.Module, x: Tensor, temperature: float = 100.0, epsilon: float = 0.0014) -> Tensor:
    """The demo: a step against the sign of the gradient of the cross-entropy to the predicted class."""
    x = x.clone().requires_grad_()
    z = model(x)
    (gradient,) = torch.autograd.grad(nn.CrossEntropyLoss()(z / temperature, z.argmax(1)), x)
    return 1 - (model(x - epsilon * gradient.sign()) / temperature).softmax(1).max()


def entropy(model: nn.Module, x: Tensor) -> Tensor:
    """The entropy of the mean over equal passes: the models of the table have no dropout."""
    p = torch.stack([model(x).softmax(1)[0] for _ in range(10)]).mean(0)
    return -(p * p.log()).sum()


def cosines(model: nn.Module, x: Tensor, sign: bool = True, rescale: bool = True, classes: int | None = None) -> Tensor:
    """The cosine of every two different classes' saliency maps, by one backward pass per class."""
    x = x.clone().requires_grad_()
    raw = model(x)
    z = 10 * raw / raw.abs().amax() if rescale else raw
    maps = []
    for c in raw[0].topk(classes).indices if classes else range(raw.shape[1]):
        (g,) = torch.autograd.grad(F.cross_entropy(z, torch.tensor([int(c)])), x, retain_graph=True)
        g = g[0].sign() if sign else g[0]
        maps.append((g.amax(0) if g.ndim == 3 else g).flatten())
    pairs = [(a, b) for a in range(len(maps)) for b in range(a + 1, len(maps))]
    return torch.stack([F.cosine_similarity(maps[a], maps[b], dim=0, eps=1e-300) for a, b in pairs])


def lof(model: nn.Module, x: Tensor, state: dict[str, Tensor]) -> Tensor:
    """scikit-learn's local outlier factor on the rows of the state; without signs, so that no distances tie."""
    from sklearn.neighbors import LocalOutlierFactor

    found = LocalOutlierFactor(n_neighbors=20, novelty=True).fit(state["rows"].numpy())
    return torch.from_numpy(-found.score_samples(cosines(model, x, sign=False)[None].numpy()))


def mahalanobis(model: nn.Module, x: Tensor, state: dict[str, Tensor]) -> Tensor:
    d = cosines(model, x, classes=3) - state["mean"]
    return d @ state["precision"] @ d


CASES = {
    "log_likelihood": lambda m, x: -m(x).max(),
    "gradtrust": trust,
    "gradtrust(k=2)": lambda m, x: trust(m, x, 2),
    "gradtrust(k=4)": lambda m, x: trust(m, x, 4),
    "gradtrust(k=100)": trust,
    "gradnorm_kl": grad_norm,
    "odin": odin,
    "odin(temperature=1,epsilon=0.05)": lambda m, x: odin(m, x, 1.0, 0.05),
    "mc_dropout": entropy,
    "gga": lambda m, x: cosines(m, x).mean(),
    "gga(sign=False,summary=std_cosine)": lambda m, x: cosines(m, x, sign=False).std(correction=0),
    "gga(classes=3,rescale=False,summary=max_cosine)": lambda m, x: cosines(m, x, True, False, 3).max(),
    "gga(classes=2,summary=min_cosine)": lambda m, x: cosines(m, x, classes=2).min(),
}
FITTED = {"gga_detector(sign=False)": lof, "gga_detector(method=mahalanobis,classes=3)": mahalanobis}
