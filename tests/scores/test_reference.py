"""Every score against its definition: plain autograd, one sample at a time, float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_gradmetrics as lgm
from lightning_gradmetrics.scoring.fitted import FittedScore
from lightning_gradmetrics.scoring.registry import RECIPES
from lightning_gradmetrics.scoring.totals import Tensors
from tests.models import MODELS, fast_rows
from tests.scores import combination_cases, feature_cases, ood_cases, trust_cases
from tests.scores.fits import labels_of, ready

pytestmark = pytest.mark.filterwarnings("ignore:.*has no dropout module")  # mc_dropout on models without dropout

Definition = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class FromState:
    """The definition of a fitted score, given its state."""

    function: Callable[[nn.Module, Tensor, Tensors], Tensor]


@dataclass(frozen=True)
class OfLabel:
    """The definition of a score that needs the true label."""

    function: Callable[[nn.Module, Tensor, int], Tensor]


def definition_of(case: str, score: object) -> Definition:
    """The row of a case; for a fitted score, with its fitted state."""
    row = CASES[case]
    if isinstance(row, OfLabel):
        return lambda model, x: row.function(model, x, int(labels_of(x)))
    if isinstance(row, FromState):
        assert isinstance(score, FittedScore) and score.state is not None
        return lambda model, x: row.function(model, x, score.state)
    return row


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


def to_uniform(z: Tensor) -> Tensor:
    return F.cross_entropy(z, torch.full_like(z, 1 / z.shape[1]))


HEAD = {7: -2, 3: -1}
"""The position of the head's weight among the parameters, by the number of parameters."""


def uniform(which: str, temperature: float = 1.0, p: float = 1.0) -> Definition:
    def loss(z: Tensor) -> Tensor:
        target = torch.full_like(z, 1 / z.shape[1])
        return F.cross_entropy(z / temperature, target)

    return lambda model, x: -gradient(model, x, loss, which).norm(p)


def expected(which: str, p: float = 1.0, power: int = 1, classes: int | None = None) -> Definition:
    """The mean over the likeliest classes of a power of the norm, weighted by their probabilities."""

    def definition(model: nn.Module, x: Tensor) -> Tensor:
        probabilities, order = model(x).softmax(1)[0].detach().sort(descending=True)
        norms = [gradient(model, x, lambda z, c=c: cross_entropy(z, int(c)), which).norm(p) for c in order[:classes]]
        kept = probabilities[:classes]
        return (kept * torch.stack(norms) ** power).sum() / kept.sum()

    return definition


def features(model: nn.Module, x: Tensor) -> Tensor:
    return nn.Sequential(*list(model.children())[:-1])(x)[0]


def softmax(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).softmax(1)[0]


def squares(model: nn.Module, x: Tensor, logits: bool) -> Tensor:
    """Squared L2 norm of each parameter's gradient of the binary cross-entropy to ones."""
    z, ones = model(x), torch.ones_like(model(x))
    bce = F.binary_cross_entropy_with_logits if logits else F.binary_cross_entropy
    loss = bce(z if logits else z.softmax(1), ones, reduction="sum")
    return torch.stack([g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters()))])


def purview(take: Callable[[Tensor], Tensor]) -> Definition:
    return lambda model, x: take(squares(model, x, True)).mean() / model(x).shape[1] ** 2


def features_of(model: nn.Module, x: Tensor, objectives: tuple[str, ...], levels: tuple[str, ...]) -> Tensor:
    """The feature vector of one sample: max, min, mean, standard deviation, L1 and L2 norm over each group of parameters."""
    columns = []
    names = [name for name, _ in model.named_parameters()]
    for objective in objectives:
        z = model(x)
        target = z.argmax(1) if objective == "pseudo_label" else torch.full_like(z, 1 / z.shape[1])
        gradients = dict(
            zip(names, torch.autograd.grad(F.cross_entropy(z, target), list(model.parameters())), strict=True)
        )
        for level in levels:
            layers = dict.fromkeys(name.split(".")[0] for name in names)
            groups = {"all": [names], "layer": [[n for n in names if n.split(".")[0] == k] for k in layers]}[level]
            for group in groups:
                g = torch.cat([gradients[name].flatten() for name in group])
                mean = g.mean() if g.mean().abs() > 1e-6 * g.std() else torch.zeros(())
                columns += [g.max(), g.min(), mean, g.std(), g.norm(1), g.norm(2)]
    return torch.stack(columns)


def meta(objectives: tuple[str, ...] = ("pseudo_label",), levels: tuple[str, ...] = ("all",)) -> FromState:
    return FromState(lambda model, x, state: classified(features_of(model, x, objectives, levels), state))


def classified(features: Tensor, state: Tensors) -> Tensor:
    """The fitted classifier on the features of one sample."""
    hidden = (features.detach() - state["mean"]) / state["scale"]
    if "weight1" in state:
        hidden = (state["weight1"].T @ hidden + state["bias1"]).clamp(min=0)
    return 1 / (1 + torch.exp(-(state["weight"] @ hidden + state["bias"])))


def smoothed(
    kind: str = "",
    classes: int | None = None,
    growth: float = 3.0,
    count: int = 8,
    sigma: float = 0.02,
    seed: int = 0,
    normalise: bool = True,
) -> Definition:
    """REGrad: the gradients of each class averaged over perturbed inputs, their norms layer by layer, both weighted."""

    def definition(model: nn.Module, x: Tensor) -> Tensor:
        noise = torch.randn(count, *x.shape[1:], generator=torch.Generator().manual_seed(seed)).to(x)
        inputs = [x + sigma * e for e in noise] or [x]
        layers = [[p for name, p in m.named_parameters() if kind in name] for m in model if list(m.parameters())]
        probabilities, order = softmax(model, x).detach().sort(descending=True)
        norms = []
        for c in order[:classes]:
            norms.append([])
            for parameters in layers:
                found = [torch.autograd.grad(cross_entropy(model(y), int(c)), parameters) for y in inputs]
                means = [torch.stack(g).mean(0).flatten() for g in zip(*found, strict=True)]
                norms[-1].append(torch.cat(means).norm())
        roots = probabilities[:classes].sqrt()
        depths = torch.tensor(
            [math.exp(growth * i / max(1, len(layers) - 1)) for i in range(len(layers))], dtype=x.dtype
        )
        weights = roots / roots.sum() if normalise else roots
        return weights @ torch.stack([torch.stack(row) for row in norms]) @ (depths / depths.sum())

    return definition


def subspace(model: nn.Module, x: Tensor, state: Tensors) -> Tensor:
    """The whole gradient of the head's weight, projected row by row."""
    whole = gradient(model, x, to_uniform, "head").view(-1, len(state["directions"]))
    return -(whole @ state["directions"] @ state["directions"].T).norm()


def error_norm(model: nn.Module, x: Tensor, label: int) -> Tensor:
    return (softmax(model, x) - torch.eye(softmax(model, x).numel(), dtype=x.dtype)[label]).norm()


def of_label(which: str, p: float = 2.0) -> OfLabel:
    return OfLabel(lambda model, x, label: gradient(model, x, lambda z: cross_entropy(z, label), which).norm(p))


def influence(model: nn.Module, x: Tensor, state: Tensors) -> Tensor:
    """The quadratic form of the head's whole gradient, weight and bias, with the Kronecker product of the factors."""
    h = torch.cat([features(model, x).detach(), torch.ones(1, dtype=x.dtype)])
    z = model(x).detach().requires_grad_()
    (g,) = torch.autograd.grad(cross_entropy(z, int(z.argmax())), z)
    whole = torch.outer(g[0], h).flatten()
    return whole @ torch.kron(state["output"], state["features"]) @ whole


detector = FromState(lambda model, x, state: classified((squares(model, x, True) + 1e-12).log(), state))


CASES: dict[str, Definition | FromState | OfLabel] = {
    "max_softmax": lambda m, x: 1 - softmax(m, x).max(),
    "max_softmax(temperature=3.0)": lambda m, x: 1 - (m(x) / 3).softmax(1).max(),
    "entropy": lambda m, x: torch.distributions.Categorical(probs=softmax(m, x)).entropy(),
    "margin": lambda m, x: -(softmax(m, x).sort().values[-1] - softmax(m, x).sort().values[-2]),
    "energy": lambda m, x: -m(x).exp().sum().log(),
    "energy(temperature=2.0)": lambda m, x: -2 * (m(x) / 2).exp().sum().log(),
    "max_logit": lambda m, x: -m(x).max(),
    "doctor": lambda m, x: (1 - softmax(m, x).square().sum()) / softmax(m, x).square().sum(),
    "doctor(form=beta)": lambda m, x: (1 - softmax(m, x).max()) / softmax(m, x).max(),
    "gradnorm": uniform("head"),
    "gradnorm(temperature=2.0)": uniform("head", 2.0),
    "gradnorm(p=2)": uniform("head", p=2),
    "gradnorm(factor=output)": lambda m, x: -(softmax(m, x) - 1 / softmax(m, x).numel()).norm(1),
    "pseudo_label(factor=output,statistic=l2)": lambda m, x: (
        softmax(m, x) - torch.eye(softmax(m, x).numel(), dtype=x.dtype)[softmax(m, x).argmax()]
    ).norm(2),
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
    "exgrad(classes=1)": pseudo("head", lambda g: g.norm(1)),
    "exgrad(classes=3)": expected("head", classes=3),
    "exgrad(classes=2,p=inf)": expected("head", float("inf"), classes=2),
    "exgrad(classes=99)": expected("head"),
    "exgrad(classes=2,target=all)": expected("all", classes=2),
    "exgrad(classes=99,target=all)": expected("all"),
    "uniform": uniform("head"),
    "uniform(statistic=std,target=all)": lambda m, x: -gradient(m, x, to_uniform, "all").std(),
    "uniform(statistic=min,target=all,temperature=2)": lambda m, x: gradient(
        m, x, lambda z: to_uniform(z / 2), "all"
    ).min(),
    "confounding": lambda m, x: squares(m, x, False).sum(),
    "confounding(logits=True)": lambda m, x: squares(m, x, True).sum(),
    "confounding(target=head)": lambda m, x: squares(m, x, False)[HEAD[len(list(m.parameters()))]],
    "confounding(target=head,logits=True)": lambda m, x: squares(m, x, True)[HEAD[len(list(m.parameters()))]],
    "purview": purview(lambda s: s[: (len(s) - 1) // 2]),
    "purview(part=final)": purview(lambda s: s[len(s) // 2 :]),
    "oberdiek": meta(),
    "oberdiek(classifier=network)": meta(),
    "oberdiek(levels='all+layer',objectives='pseudo_label+uniform')": meta(
        ("pseudo_label", "uniform"), ("all", "layer")
    ),
    "confounding_detector(epochs=5)": detector,
    "fisher_trace": expected("head", 2, 2),
    "fisher_trace(target=all)": expected("all", 2, 2),
    "fisher_trace(classes=2)": expected("head", 2, 2, 2),
    "fisher_trace(classes=3,target=all)": expected("all", 2, 2, 3),
    "regrad": smoothed(),
    "regrad(classes=2,growth=0.5,perturbations=3,seed=5,sigma=0.3)": smoothed("", 2, 0.5, 3, 0.3, 5),
    "regrad(perturbations=0)": smoothed(count=0),
    "regrad(classes=3,normalise=False,perturbations=0)": smoothed(classes=3, count=0, normalise=False),
    "regrad(perturbations=2,target='*weight')": smoothed("weight", count=2),
    "gradorth": FromState(subspace),
    "gradorth(energy=0.6)": FromState(subspace),
    "grand": of_label("all"),
    "grand(p=1,target=head)": of_label("head", 1),
    "el2n": OfLabel(error_norm),
    "nll": OfLabel(lambda model, x, label: cross_entropy(model(x), label)),
    "kfac_influence": FromState(influence),
    "feature_norm": lambda m, x: -features(m, x).norm(1),
    "feature_norm(p=2)": lambda m, x: -features(m, x).norm(2),
    **trust_cases.CASES,
    **{case: FromState(definition) for case, definition in trust_cases.FITTED.items()},
    **feature_cases.CASES,
    **{case: FromState(definition) for case, definition in feature_cases.FITTED.items()},
    **ood_cases.CASES,
    **{case: FromState(definition) for case, definition in ood_cases.FITTED.items()},
    **{case: FromState(definition) for case, definition in combination_cases.FITTED.items()},
}
"""The test table: one row per score and setting, with its definition for a single sample ``(1, ...)``."""


def tolerances(case: str) -> dict[str, float]:
    """In float64; pytorch-ood's detectors have float32 in their own code."""
    return {"rtol": 1e-4, "atol": 1e-5} if case.startswith("pytorch_ood") else {"rtol": 1e-9, "atol": 1e-12}


def test_every_registered_score_has_a_row() -> None:
    assert {case.partition("(")[0] for case in CASES} == set(RECIPES)


FAST = set({case.partition("(")[0]: case for case in reversed(CASES)}.values())
"""The first row of each score, for the fast subset."""


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("case", fast_rows(CASES, FAST))
def test_equals_its_definition(case: str, model_name: str) -> None:
    make_model, make_inputs = MODELS[model_name]
    model, inputs = make_model().double(), make_inputs(4).double()
    score = ready(case, model, make_inputs)
    (found,) = lgm.score(model, inputs, score, labels_of(inputs)).values()
    definition = definition_of(case, score)
    wanted = torch.stack([definition(model, x[None]).detach().squeeze() for x in inputs])
    torch.testing.assert_close(found, wanted.to(found.dtype), **tolerances(case))
