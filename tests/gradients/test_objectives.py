"""Objectives of confident samples: gradients stay accurate at any logit gap."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_gradmetrics as lgm
from lightning_gradmetrics.gradients.objectives import OBJECTIVES, Objective, class_residual, log_probabilities
from lightning_gradmetrics.gradients.scaling import rescaled_moments, unit_losses
from lightning_gradmetrics.gradients.statistics import STATISTICS, GradientStatistics
from tests.models import fast_rows

GAPS = (5, 15, 20, 30, 45, 60)


def exact(logits: Tensor) -> Tensor:
    """Cross-entropy of one sample to its predicted class, without ``1 - p``."""
    largest, others = logits[0].max(), logits[0].scatter(0, logits.argmax(1), -torch.inf)
    return F.softplus(others.logsumexp(0) - largest, threshold=100)


def confident(gap: float) -> tuple[nn.Module, Tensor]:
    """A float64 model with float32 weights, and 16 samples whose two largest logits are about ``gap`` apart."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 8))
    with torch.no_grad():
        model[4].weight.mul_(16 + 4 * gap)
        model, inputs = model.double(), torch.randn(20_000, 12).double()
        best = model(inputs).topk(2, 1).values
    distance = (best[:, 0] - best[:, 1] - gap).abs()
    return model.eval(), inputs[distance.argsort()[:16]]


def true_rows(model: nn.Module, inputs: Tensor) -> list[tuple[Tensor, ...]]:
    return [torch.autograd.grad(exact(model(one[None])), tuple(model.parameters())) for one in inputs]


def flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


def worst(found: Tensor, expected: list[Tensor]) -> float:
    right = torch.stack(expected).detach()
    return float(((found.double() - right).abs() / right.abs()).max())


@pytest.mark.parametrize("engine", ["auto", "vmap", "reference"])
@pytest.mark.parametrize("gap", GAPS)
def test_float32_gradients_of_confident_samples(gap: float, engine: str) -> None:
    model, inputs = confident(gap)
    rows = [flat(row) for row in true_rows(model, inputs)]
    single = copy.deepcopy(model).float()
    found = lgm.gradient_statistics(single, inputs.float(), "pseudo_label", engine=engine)
    assert worst(found.norm(1), [row.abs().sum() for row in rows]) < 1e-4
    assert worst(found.norm(2), [row.norm() for row in rows]) < 1e-4
    assert worst(found.std, [row.std() for row in rows]) < 1e-4


@pytest.mark.parametrize("gap", GAPS)
def test_float32_head_scores_of_confident_samples(gap: float) -> None:
    model, inputs = confident(gap)
    rows = [gradients[4].flatten() for gradients in true_rows(model, inputs)]
    scores = {name: f"pseudo_label(statistic={name})" for name in ("l1", "l2", "std")}
    found = lgm.score(copy.deepcopy(model).float(), inputs.float(), scores)
    assert worst(found["l1"], [row.abs().sum() for row in rows]) < 1e-4
    assert worst(found["l2"], [row.norm() for row in rows]) < 1e-4
    assert worst(found["std"], [row.std() for row in rows]) < 1e-4


@pytest.mark.parametrize("gap", fast_rows(GAPS, [5, 60]))
def test_labels_and_averages_over_classes_stay_accurate(gap: float) -> None:
    """GraNd, EL2N, ExGrad and REGrad of confident samples, in float32 and float64."""
    model, inputs = confident(gap)
    labels = model(inputs).argmax(1)
    scores = [
        "grand",
        "grand(target=head)",
        "el2n",
        "exgrad",
        "exgrad(p=2.0)",
        "fisher_trace",
        "max_softmax",
        "entropy",
    ]
    scores.append("regrad(perturbations=2,sigma=0.0)")
    found = lgm.score(copy.deepcopy(model).float(), inputs.float(), scores, labels)
    right = lgm.score(model, inputs, scores, labels)
    for name in scores:
        assert worst(found[name], list(right[name])) < 1e-3, name
    rows = true_rows(model, inputs)
    assert worst(right["grand"], [flat(row).norm() for row in rows]) < 1e-9
    assert worst(right["grand(target=head)"], [row[4].norm() for row in rows]) < 1e-9
    assert worst(right["el2n"], [row[5].norm() for row in rows]) < 1e-9
    # The first order of sum_c p_c |p - e_c|_1 in 1 - p_y: twice from the likeliest class and twice from the others.
    if gap >= 20:
        features = model[:4](inputs).abs().sum(1)
        assert worst(right["exgrad"], list(features * 2 * right["max_softmax"] * 2)) < 1e-6


@pytest.mark.parametrize("gap", [5, 15, 20])
def test_a_callable_runs_on_float64_logits(gap: float) -> None:
    model, inputs = confident(gap)
    seen = []

    def objective(logits: Tensor) -> Tensor:
        seen.append(logits.dtype)
        return F.cross_entropy(logits, logits.argmax(1), reduction="none")

    found = lgm.gradient_statistics(copy.deepcopy(model).float(), inputs.float(), objective)
    rows = [flat(row) for row in true_rows(model, inputs)]
    assert worst(found.norm(1), [row.abs().sum() for row in rows]) < 1e-4
    assert set(seen) == {torch.float64}


def test_a_callable_may_contain_float32_tensors() -> None:
    weights = torch.rand(4) + 0.5
    model, inputs = nn.Linear(5, 4), torch.randn(6, 5)

    def weighted(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, torch.ones(len(logits), dtype=torch.long), weights, reduction="none")

    found = lgm.gradient_statistics(model, inputs, weighted)
    labels = torch.ones(6, dtype=torch.long)
    right = lgm.gradient_statistics(model, inputs, "label", targets=labels).norm(1) * weights[1]
    torch.testing.assert_close(found.norm(1), right)


def test_half_precision_callables_may_contain_half_precision_tensors() -> None:
    weights = torch.rand(4).bfloat16() + 0.5
    model, inputs = nn.Linear(5, 4).bfloat16(), torch.randn(6, 5).bfloat16()
    found = lgm.gradient_statistics(model, inputs, lambda z: z @ weights, statistics=["linf"])
    assert bool(found.norm(math.inf).isfinite().all())


@pytest.mark.filterwarnings("ignore:no fast rule")
def test_the_error_of_a_callable_is_raised() -> None:
    def broken(logits: Tensor) -> Tensor:
        raise RuntimeError("no such class")

    with pytest.raises(RuntimeError, match="no such class"):
        lgm.gradient_statistics(nn.Linear(5, 4), torch.randn(6, 5), broken)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_values_and_gradients_are_those_of_the_definitions(name: str) -> None:
    logits = (3 * torch.randn(7, 5, dtype=torch.float64)).requires_grad_()
    labels = torch.arange(7) % 5
    ranked = logits.detach().argsort(dim=1, descending=True)[:, 2]
    definitions = {
        "pseudo_label": lambda: F.cross_entropy(logits, logits.argmax(1), reduction="none"),
        "uniform": lambda: F.cross_entropy(logits, torch.full_like(logits, 0.2), reduction="none"),
        "confounding": lambda: F.binary_cross_entropy(logits.softmax(1), torch.ones_like(logits), reduction="none").sum(
            1
        ),
        "confounding_logits": lambda: F.binary_cross_entropy_with_logits(
            logits, torch.ones_like(logits), reduction="none"
        ).sum(1),
        "label": lambda: F.cross_entropy(logits, labels, reduction="none"),
        "class": lambda: F.cross_entropy(logits, torch.full((7,), 3), reduction="none"),
        "ranked_class": lambda: F.cross_entropy(logits, ranked, reduction="none"),
    }
    arguments = {"class": {"index": 3}, "ranked_class": {"rank": 2}}.get(name, {})
    found = Objective.of(name, **arguments).loss(labels)(logits)
    torch.testing.assert_close(found, definitions[name](), rtol=1e-12, atol=0)
    weights = torch.rand(7, dtype=torch.float64)
    gradients = [torch.autograd.grad((losses * weights).sum(), logits)[0] for losses in (found, definitions[name]())]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_unlikely_labels_stay_accurate_too() -> None:
    """Where softplus is linear, the gradient with respect to the label's logit is minus one."""
    logits = torch.tensor([[35.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(OBJECTIVES["label"](logits, torch.tensor([1])).sum(), logits)
    assert abs(float(gradient[0, 0]) - 1 / (1 + math.exp(-35))) < 1e-15


def test_ignored_labels_have_no_gradient() -> None:
    found = lgm.gradient_statistics(nn.Linear(5, 4), torch.randn(2, 5), "label", targets=torch.tensor([-100, 1]))
    assert found.norm(1)[0] == 0 < found.norm(1)[1]


@pytest.mark.filterwarnings("ignore:no fast rule")
@pytest.mark.parametrize(
    "objective",
    [
        Objective.of("pseudo_label"),
        Objective.of("pseudo_label", temperature=3.0),
        Objective.of("class", index=2),
        Objective.of("label"),
    ],
)
def test_closed_forms_are_the_gradients_of_autograd(objective: Objective) -> None:
    torch.manual_seed(0)
    logits, targets = 20 * torch.randn(50, 4, dtype=torch.float64), torch.randint(4, (50,))
    targets[7] = -100
    closed = objective.gradient(logits, targets)
    assert closed is not None
    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(objective.loss(targets)(leaf).sum(), leaf)
    torch.testing.assert_close(closed, expected, rtol=1e-12, atol=1e-300)


def test_objectives_without_a_closed_form_have_none() -> None:
    logits = torch.randn(3, 4)
    assert Objective.of("uniform").gradient(logits) is None
    assert Objective.of("label").gradient(logits) is None
    assert Objective.of(lambda z: z[:, 0]).gradient(logits) is None


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="softmax of one class is 1"):
        lgm.gradient_statistics(nn.Linear(5, 1), torch.randn(3, 5), "pseudo_label")


def test_residuals_and_log_probabilities() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64)
    classes = torch.arange(6) % 4
    torch.testing.assert_close(class_residual(logits, classes), logits.softmax(1) - F.one_hot(classes, 4))
    torch.testing.assert_close(log_probabilities(logits), logits.log_softmax(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_scale_of_a_loss_is_a_power_of_two_and_is_undone(dtype: torch.dtype) -> None:
    logits = torch.tensor([[9.0, 0.0, 1.0], [30.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    losses, undo = unit_losses(Objective.of("pseudo_label").loss(), logits)
    (scaled,) = torch.autograd.grad(losses.sum(), logits)
    largest = scaled.abs().amax(1)
    assert bool(((largest >= 0.5) & (largest <= 1)).all())
    assert bool((torch.frexp(undo).mantissa == 0.5).all())
    torch.testing.assert_close(
        (scaled * undo[:, None])[2], torch.tensor([-2 / 3, 1 / 3, 1 / 3]).double(), rtol=1e-2, atol=0
    )


def test_moments_are_rescaled_without_rounding() -> None:
    gradients, factors = (
        torch.randn(5, 7, dtype=torch.float64),
        torch.tensor([0.25, 2.0, 1.0, 2.0**-70, 2.0**40]).double(),
    )
    scaled = GradientStatistics.of({"w": gradients * factors[:, None]}, STATISTICS).moments
    found = rescaled_moments(GradientStatistics.of({"w": gradients}, STATISTICS).moments, factors)
    for key, value in found.items():
        assert torch.equal(value, scaled[key]), key


def test_the_smallest_standard_deviation_scales_with_the_gradient() -> None:
    entries = torch.tensor([[1.0, 1.0, 1.0], [1e-30, 3e-30, 2e-30], [0.0, 0.0, 0.0]], dtype=torch.float64)
    std = GradientStatistics.of({"w": entries}).std
    torch.testing.assert_close(std, torch.tensor([1e-16, 1e-30, 1e-16], dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("engine", ["auto", "vmap", "reference"])
@pytest.mark.parametrize("wrong", [3, -1])
def test_every_engine_names_a_label_outside_of_the_classes(engine: str, wrong: int) -> None:
    targets = torch.tensor([0, -100, wrong])
    with pytest.raises(ValueError, match=f"the labels contain {wrong}, but the logits have 3 classes"):
        lgm.gradient_statistics(nn.Linear(4, 3), torch.randn(3, 4), "label", targets=targets, engine=engine)
