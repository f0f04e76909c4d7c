"""REGrad: limiting cases, which are other scores; its noise; refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_gradmetrics as lgm
from lightning_gradmetrics.scoring.dry_run import needs_of
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.registry import make
from tests.models import cnn, fast_rows, images


def score(case: str, model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    (found,) = lgm.score(model, inputs, case).values()
    return found


@pytest.mark.slow
def test_without_noise_the_perturbed_inputs_are_the_input() -> None:
    model, inputs = cnn().double(), images(5).double()
    still = score("regrad(perturbations=0)", model, inputs)
    torch.testing.assert_close(score("regrad(sigma=0.0,perturbations=3)", model, inputs), still)
    assert not torch.isclose(score("regrad(sigma=0.5)", model, inputs), still).all()


@pytest.mark.parametrize("perturbations", fast_rows([0, 4], [0]))
def test_growth_turns_from_the_mean_of_the_layers_to_the_last(perturbations: int) -> None:
    model, inputs = cnn().double(), images(4).double()
    rest = f"perturbations={perturbations}"
    layers = [score(f"regrad(target='{i}.*',{rest})", model, inputs) for i in (0, 1, 3, 7)]
    torch.testing.assert_close(score(f"regrad(growth=0,{rest})", model, inputs), torch.stack(layers).mean(0))
    torch.testing.assert_close(score(f"regrad(growth=200,{rest})", model, inputs), layers[-1])
    torch.testing.assert_close(score(f"regrad(growth=-200,{rest})", model, inputs), layers[0])


def test_on_the_head_it_is_a_closed_form() -> None:
    logits, features = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    p = logits.softmax(1)
    weights = p.sqrt() / p.sqrt().sum(1, keepdim=True)
    residuals = (p[:, None] - torch.eye(4).double()).norm(dim=2)
    found = make("regrad(target=head,perturbations=0)")(Evidence(logits, features))
    torch.testing.assert_close(found, features.norm(dim=1) * (weights * residuals).sum(1))


@pytest.mark.slow
def test_the_smoothed_gradient_converges_to_its_mean() -> None:
    """Different seeds give different values, which differ less with more perturbations."""
    model, inputs = cnn().double(), images(2).double()

    def spread(count: int) -> float:
        found = [score(f"regrad(perturbations={count},sigma=0.5,seed={s})", model, inputs) for s in range(4)]
        return float(torch.stack(found).std(0).mean())

    assert 0 < spread(40) < 0.5 * spread(2)


def test_k_classes_take_k_backward_passes() -> None:
    needs = needs_of([make("regrad(classes=3,perturbations=0)")], 1000)
    assert len(needs.gradients["all"]) == 3
    (probe,) = needs_of([make("regrad(classes=3)")], 1000).probes
    assert probe(cnn(), images(2)).shape == (2, 3, 4)


@pytest.mark.slow
def test_fewer_samples_than_perturbations() -> None:
    model, inputs = cnn().double(), images(3).double()
    parts = torch.cat([score("regrad(perturbations=5)", model, x[None]) for x in inputs])
    torch.testing.assert_close(score("regrad(perturbations=5)", model, inputs), parts)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("regrad(target=head)", "perturbations=0"),
        ("regrad(perturbations=-1)", "a whole number of at least 0"),
        ("regrad(sigma=-1.0)", "number of at least 0"),
        ("regrad(target='nothing.*')", "no parameter of Sequential was chosen"),
        ("regrad(target='nothing.*',perturbations=0)", "no parameter of Sequential was chosen"),
    ],
)
def test_wrong_inputs_are_refused(case: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(case, cnn(), images(2))


def test_integer_inputs_cannot_be_perturbed() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 4)).eval()
    tokens = torch.randint(0, 5, (3, 2))
    with pytest.raises(TypeError, match="perturbed inputs"):
        score("regrad", model, tokens)
    assert score("regrad(perturbations=0)", model, tokens).shape == (3,)
