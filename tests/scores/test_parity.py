"""Scores compared with other software, run in the same test."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from gradient_metrics import GradientMetricCollector
from gradient_metrics.metrics import Max, Mean, MeanStd, Min, PNorm
from pytorch_ood.detector import GradNorm, GradUncertainty
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F

import lightning_gradmetrics as lgm
from lightning_gradmetrics.scoring.registry import make
from lightning_gradmetrics.scoring.totals import row_keys
from tests.models import MODELS, cnn, images, mlp
from tests.scores.fits import fit_batches


def values(model, inputs, score) -> torch.Tensor:
    (found,) = lgm.score(model, inputs, score).values()
    return found


def late(name: str) -> bool:
    return name.startswith(("3.", "7."))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("kept", [None, "7.weight", late])
def test_gradnorm_beside_pytorch_ood(kept, temperature: float) -> None:
    """All parameters, the head's weight as in the paper (by pattern and in closed form), and any predicate."""
    model, x = cnn().double(), images(5).double()
    accepts = (lambda name: name == kept) if isinstance(kept, str) else kept
    expected = GradNorm(model, param_filter=accepts, temperature=temperature).predict(x)
    target = kept or "all"
    torch.testing.assert_close(values(model, x, make("gradnorm", target=target, temperature=temperature)), expected)
    if kept == "7.weight":
        torch.testing.assert_close(values(model, x, make("gradnorm", temperature=temperature)), expected)


@pytest.mark.parametrize("name", MODELS)
def test_gradnorm_beside_gradient_metrics(name: str) -> None:
    """The variant of the package's README: the 1-norm over all parameters of the network."""
    make_model, make_inputs = MODELS[name]
    model, x = make_model().double(), make_inputs(4).double()
    z = model(x)
    loss = F.cross_entropy(z, torch.full_like(z, 1 / z.shape[1]), reduction="none")
    expected = GradientMetricCollector(PNorm(model, p=1))(loss)[:, 0]
    torch.testing.assert_close(values(model, x, "gradnorm(target=all)"), -expected)
    torch.testing.assert_close(values(model, x, "uniform(target=all)"), -expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("objective", ["pseudo_label", "uniform"])
def test_features_beside_gradient_metrics(objective: str, name: str) -> None:
    """Over all parameters and per layer."""
    make_model, make_inputs = MODELS[name]
    model, x = make_model().double(), make_inputs(4).double()
    found, names = lgm.gradient_features(model, x, objective, levels="all+layer")
    z = model(x)
    target = z.argmax(1) if objective == "pseudo_label" else torch.full_like(z, 1 / z.shape[1])
    layers = [m for m in model if list(m.parameters())]
    kinds = [Max, Min, Mean, lambda m: MeanStd(m), lambda m: PNorm(m, p=1), lambda m: PNorm(m, p=2)]
    metrics = [kind(part) for part in [model, *layers] for kind in kinds]
    expected = GradientMetricCollector(metrics)(F.cross_entropy(z, target, reduction="none"))
    keep = [i for i in range(expected.shape[1]) if i % 7 != 3]  # MeanStd gives the mean a second time
    torch.testing.assert_close(found, expected[:, keep], rtol=1e-7, atol=1e-12)
    assert names[:2] == (f"{objective}/all/max", f"{objective}/all/min") and names[-1].endswith("/l2")
    assert len(names) == found.shape[1] == 6 * (1 + len(layers))


def test_features_of_several_objectives_and_per_parameter() -> None:
    model, x = mlp(), torch.randn(3, 7)
    both, names = lgm.gradient_features(model, x, "pseudo_label+uniform", levels="parameter", statistics=("l1", "std"))
    assert (
        names[:2] == ("pseudo_label/0.weight/l1", "pseudo_label/0.weight/std") and names[-1] == "uniform/2.weight/std"
    )
    for i, objective in enumerate(["pseudo_label", "uniform"]):
        alone = lgm.gradient_statistics(model, x, objective, per_parameter=True)
        wanted = torch.stack([alone.norm(1), alone.std], -1).flatten(1)
        torch.testing.assert_close(both[:, 6 * i : 6 * i + 6], wanted)
    late, _ = lgm.gradient_features(model, x, parameters=lambda name: name.startswith("2."), statistics=("l2",))
    torch.testing.assert_close(
        late[:, 0], lgm.gradient_statistics(model, x, "pseudo_label", lambda n: n[0] == "2").norm(2)
    )
    with pytest.raises(ValueError, match="unknown level 'block'; available: all, layer, parameter"):
        lgm.gradient_features(model, x, levels="block")


@pytest.mark.parametrize("kept", [None, "7.*", late])
def test_confounding_beside_pytorch_ood(kept) -> None:
    """The sign of the original code; pytorch-ood 0.4 returns the negative."""
    model, x = cnn().double(), images(5).double()
    accepts = (lambda name: name.startswith("7.")) if isinstance(kept, str) else kept
    expected = -GradUncertainty(model, param_filter=accepts).predict(x)
    torch.testing.assert_close(values(model, x, make("confounding", target=kept or "all")), expected)


def test_confounding_of_the_head_in_closed_form() -> None:
    model, x = cnn().double(), images(5).double()
    h, p, z = model[:7](x), model(x).softmax(1), model(x)
    classes = z.shape[1]
    square = classes**2 * (p - 1 / classes).square().sum(1)
    torch.testing.assert_close(values(model, x, "confounding(target=head)"), square * h.square().sum(1))
    torch.testing.assert_close(values(model, x, "confounding(target='7.weight')"), square * h.square().sum(1))
    torch.testing.assert_close(values(model, x, "confounding(target='7.*')"), square * (h.square().sum(1) + 1))
    paper = h.square().sum(1) * torch.sigmoid(-z).square().sum(1)
    torch.testing.assert_close(values(model, x, "confounding(target=head,logits=True)"), paper)
    torch.testing.assert_close(values(model, x, "confounding(target='7.weight',logits=True)"), paper)


def test_confounding_stays_accurate_at_large_gaps() -> None:
    """At a logit gap of 200 in float32 the softmax underflows; pytorch-ood's gradient is then wrong, this one is not."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False)).eval()
    nn.init.eye_(model[1].weight)
    x = torch.tensor([[200.0, 0.0, 0.0]])
    exact = 3**2 * (torch.tensor([1.0, 0, 0]) - 1 / 3).square().sum() * 200.0**2
    torch.testing.assert_close(values(model, x, "confounding"), exact[None])
    assert not torch.isclose(-GradUncertainty(model).predict(x), exact, rtol=0.1)


@pytest.mark.parametrize("part", ["initial", "final"])
@pytest.mark.parametrize("name", MODELS)
def test_purview_as_in_the_demo(part: str, name: str) -> None:
    """One sample at a time: the mean loss, .grad of each parameter from zero, and the demo's halves."""
    make_model, make_inputs = MODELS[name]
    model, x = make_model().double(), make_inputs(3).double()
    expected = []
    for sample in x:
        model.zero_grad()
        z = model(sample[None])
        nn.BCEWithLogitsLoss(reduction="none")(z, torch.ones_like(z)).mean().backward()
        squares = [float((p.grad**2).sum()) for p in model.parameters()]
        last = len(squares) - 1
        expected.append(-np.mean(squares[: last // 2] if part == "initial" else squares[-(-last // 2) :]))
    torch.testing.assert_close(-values(model, x, make("purview", part=part)), torch.tensor(expected))
    with pytest.raises(ValueError, match="part='middle'; allowed: 'initial', 'final'"):
        values(model, x, "purview(part=middle)")


@pytest.mark.parametrize("classifier", ["logistic", "network"])
@pytest.mark.parametrize("levels", ["all", "all+layer"])
def test_oberdiek_beside_scikit_learn(levels: str, classifier: str) -> None:
    """Fitted by scikit-learn on the feature matrix, its predict_proba on new samples is the score."""
    model = cnn().double()
    (x, y), *_ = fit_batches(model, images)[0]
    score = lgm.fit(model, [(x, y)], make("oberdiek", classifier=classifier, levels=levels))[0]
    features, _ = lgm.gradient_features(model, x, levels=levels)
    noise = features.std(0) < 1e-12  # the gradient of the head sums to zero: its mean is rounding
    order = row_keys(x).argsort()  # a network's training depends on the order of the rows
    wrong = (model(x).argmax(1) != y)[order]
    estimator = LogisticRegression(max_iter=2000, tol=1e-8)
    if classifier == "network":
        estimator = MLPClassifier((32,), alpha=1e-2, max_iter=300, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = make_pipeline(StandardScaler(), estimator).fit(
            features.masked_fill(noise, 0)[order].numpy(), wrong.numpy()
        )
    new = images(6).double()
    later, _ = lgm.gradient_features(model, new, levels=levels)
    expected = fitted.predict_proba(later.masked_fill(noise, 0).numpy())[:, 1]
    torch.testing.assert_close(values(model, new, score), torch.tensor(expected), rtol=1e-5, atol=1e-6)
