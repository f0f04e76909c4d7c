"""Every score against its definition: plain autograd, one sample at a time, float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_gradmetrics as lgm
from tests.models import MODELS

Definition = Callable[[nn.Module, Tensor], Tensor]


def gradient(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], which: str) -> Tensor:
    """All gradient entries of one sample's loss, for the head's weight or for all parameters."""
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    parameters = [head.weight] if which == "head" else list(model.parameters())
    gradients = torch.autograd.grad(loss(model(x)), parameters)
    return torch.cat([g.flatten() for g in gradients])


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    return F.cross_entropy(logits, torch.tensor([label]))


def pseudo(which: str, statistic: Callable[[Tensor], Tensor]) -> Definition:
    return lambda model, x: statistic(gradient(model, x, lambda z: cross_entropy(z, int(z.argmax())), which))


def uniform(which: str, temperature: float = 1.0, p: float = 1.0) -> Definition:
    def loss(z: Tensor) -> Tensor:
        target = torch.full_like(z, 1 / z.shape[1])
        return F.cross_entropy(z / temperature, target)

    return lambda model, x: -gradient(model, x, loss, which).norm(p)


def expected(which: str, p: float = 1.0) -> Definition:
    def definition(model: nn.Module, x: Tensor) -> Tensor:
        probabilities = model(x).softmax(1)[0].detach()
        norms = [gradient(model, x, lambda z, c=c: cross_entropy(z, c), which).norm(p) for c in range(len(probabilities))]
        return (probabilities * torch.stack(norms)).sum()

    return definition


def trust(model: nn.Module, x: Tensor) -> Tensor:
    """As the demo: squared error to 1/C, the head weight's gradient, the variance over features of its square, largest over mean."""
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    z = model(x)
    (g,) = torch.autograd.grad(F.mse_loss(z, torch.full_like(z, 1 / z.shape[1])), [head.weight])
    variance = (g**2).var(1)
    return -(variance.max() / variance.mean())


def features(model: nn.Module, x: Tensor) -> Tensor:
    return nn.Sequential(*list(model.children())[:-1])(x)[0]


def softmax(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).softmax(1)[0]


CASES: dict[str, Definition] = {
    "max_softmax": lambda m, x: 1 - softmax(m, x).max(),
    "max_softmax(temperature=3.0)": lambda m, x: 1 - (m(x) / 3).softmax(1).max(),
    "entropy": lambda m, x: torch.distributions.Categorical(probs=softmax(m, x)).entropy(),
    "margin": lambda m, x: -(softmax(m, x).sort().values[-1] - softmax(m, x).sort().values[-2]),
    "energy": lambda m, x: -m(x).exp().sum().log(),
    "energy(temperature=2.0)": lambda m, x: -2 * (m(x) / 2).exp().sum().log(),
    "max_logit": lambda m, x: -m(x).max(),
    "gradtrust": trust,
    "gradnorm": uniform("head"),
    "gradnorm(temperature=2.0)": uniform("head", 2.0),
    "gradnorm(p=2)": uniform("head", p=2),
    "gradnorm(target=all)": uniform("all"),
    "gradnorm(target=all,temperature=0.5,p=3)": uniform("all", 0.5, 3),
    "pseudo_label": pseudo("head", lambda g: g.norm(1)),
    "pseudo_label(statistic=l2)": pseudo("head", lambda g: g.norm(2)),
    "pseudo_label(statistic=linf)": pseudo("head", lambda g: g.norm(float("inf"))),
    "pseudo_label(statistic=l3)": pseudo("head", lambda g: g.norm(3)),
    "pseudo_label(statistic=max)": pseudo("head", torch.max),
    "pseudo_label(statistic=min)": pseudo("head", lambda g: -g.min()),
    "pseudo_label(statistic=std)": pseudo("head", torch.std),
    "pseudo_label(statistic=mean)": pseudo("head", torch.mean),
    "pseudo_label(target=all)": pseudo("all", lambda g: g.norm(1)),
    "pseudo_label(target=all,statistic=std)": pseudo("all", torch.std),
    "pseudo_label(target=all,statistic=max)": pseudo("all", torch.max),
    "exgrad": expected("head"),
    "exgrad(p=2)": expected("head", 2),
    "exgrad(p=inf)": expected("head", float("inf")),
    "exgrad(target=all)": expected("all"),
    "feature_norm": lambda m, x: -features(m, x).norm(1),
    "feature_norm(p=2)": lambda m, x: -features(m, x).norm(2),
}
"""The test table: one row a score and setting, with its definition for a single sample ``(1, ...)``."""


def test_every_registered_score_has_a_row() -> None:
    assert {case.partition("(")[0] for case in CASES} == set(lgm.scores.RECIPES)


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_equals_its_definition(case: str, model_name: str) -> None:
    make_model, make_inputs = MODELS[model_name]
    model, inputs = make_model().double(), make_inputs(4).double()
    (found,) = lgm.score(model, inputs, case).values()
    wanted = torch.stack([CASES[case](model, x[None]).detach().squeeze() for x in inputs])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
