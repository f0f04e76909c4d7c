"""Averages over the likeliest classes: their cost, and their dependence on the number of classes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_gradmetrics as lgm
from lightning_gradmetrics.gradients.softmax import Softmax
from lightning_gradmetrics.scores.expected import residual_norms
from lightning_gradmetrics.scoring.dry_run import needs_of
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.registry import make
from tests.models import cnn, images

SCORES = ("exgrad", "exgrad(p=2)", "exgrad(p=inf)", "fisher_trace")


def value(case: str, logits: torch.Tensor) -> torch.Tensor:
    return make(case)(Evidence(logits.double(), torch.ones(len(logits), 1).double()))


@pytest.mark.parametrize("score", ["exgrad", "fisher_trace"])
def test_k_classes_take_k_backward_passes(score: str) -> None:
    def passes(case: str, classes: int) -> int:
        return len(needs_of([make(case)], classes).gradients["all"])

    assert passes(f"{score}(target=all,classes=3)", 1000) == 3
    assert passes(f"{score}(target=all)", 1000) == 1000
    assert passes(f"{score}(target=all,classes=30)", 10) == 10
    both = [make(f"{name}(target=all,classes=3)") for name in ("exgrad", "fisher_trace")]
    assert len(needs_of(both, 1000).gradients["all"]) == 3


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(SCORES), st.floats(0.1, 8))
def test_on_the_head_the_mean_grows_with_the_number_of_classes(seed: int, case: str, spread: float) -> None:
    """Less likely classes have larger gradients, so each further class raises the mean."""
    logits = spread * torch.randn(6, 7, generator=torch.Generator().manual_seed(seed))
    inner = case.removesuffix(")") + ("," if case.endswith(")") else "(")
    values = torch.stack([value(f"{inner}classes={k})", logits) for k in range(1, 8)])
    assert (values.diff(dim=0) >= -1e-12).all()
    torch.testing.assert_close(values[-1], value(case, logits))


@pytest.mark.parametrize("case", ["exgrad(classes=2)", "fisher_trace(classes=2)"])
def test_a_spread_prediction_is_the_most_uncertain_one(case: str) -> None:
    """Two of 1000 classes have a hundredth of the probability; the average over them still ranks correctly."""
    spread, sure = torch.zeros(1, 1000), torch.zeros(1, 1000)
    sure[0, 0] = 8.0
    truncated = value(case, torch.cat([spread, sure]))
    assert truncated[0] > truncated[1]


def test_one_class_is_the_pseudo_label() -> None:
    model, inputs = cnn().double(), images(6).double()
    for target in ("head", "all"):
        pairs = [f"exgrad(classes=1,target={target})", f"pseudo_label(target={target})"]
        first, second = lgm.score(model, inputs, pairs).values()
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("engine", ["auto", "vmap", "reference"])
@pytest.mark.parametrize("case", ["exgrad(classes=3,{})", "fisher_trace(classes=3,{})"])
def test_the_engines_and_the_closed_form_agree(case: str, engine: str) -> None:
    """The head's weight by its name, as any parameter, against the head in closed form."""
    model, inputs = cnn().double(), images(5).double()
    by_name, closed = case.format("target='7.weight'"), case.format("target=head")
    first, second = lgm.score(model, inputs, [by_name, closed], engine=engine).values()
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
def test_residual_norms(p: float) -> None:
    probabilities = torch.randn(4, 5).double().softmax(1)
    residuals = probabilities[:, None] - torch.eye(5).double()
    norms = residual_norms(Softmax(probabilities.log()), p)
    torch.testing.assert_close(norms, torch.linalg.vector_norm(residuals, p, 2))


def test_the_likeliest_class_stays_accurate() -> None:
    """``1 - p`` at a logit gap of 60 is 3e-26, and 0 where it is subtracted."""
    logits = torch.zeros(2, 4)
    logits[:, 0] = torch.tensor([50.0, 60.0])
    first, second = value("exgrad(classes=1)", logits)
    torch.testing.assert_close(first / second, torch.tensor(10.0).double().exp())


@pytest.mark.parametrize("case", ["exgrad(classes=0)", "fisher_trace(classes=-1,target=all)", "regrad(classes=0)"])
def test_no_classes_are_refused(case: str) -> None:
    with pytest.raises(ValueError, match="classes="):
        lgm.score(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval(), torch.randn(2, 4), case)
