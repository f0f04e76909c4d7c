"""Scores of generated text against plain autograd, one sequence or one token at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import lightning_gradmetrics as lgm
from tests.language.language_models import ANSWERS, MAKERS, PROMPTS, answer_logits, head_of, language_model
from tests.models import assert_same_state, state_of

pytestmark = pytest.mark.filterwarnings("ignore:.*no fast rule for these parameters")  # norms compute in float32

FLOAT32_INSIDE = {"rtol": 2e-5, "atol": 1e-7}
"""Norms, rotary embeddings and softmax compute in float32 whatever the model's type."""

OBJECTIVES = {
    "pseudo_label": lambda z, y: F.cross_entropy(z, z.argmax(-1), reduction="none"),
    "grand": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "uniform": lambda z, y: -z.log_softmax(-1).mean(-1),
}
NORMS = {"l1": 1, "l2": 2, "linf": torch.inf, "l0.5": 0.5}


def name_of(objective: str, statistic: str, target: str) -> str:
    if objective == "grand":
        return f"grand(p={statistic[1:]},target={target})"
    return f"{objective}(statistic='{statistic}',target={target})"


def cases(target: str) -> dict[str, tuple[str, str]]:
    """The objective and the statistic of each score."""
    found = {}
    for objective in OBJECTIVES:
        for statistic in NORMS:
            found[name_of(objective, statistic, target)] = (objective, statistic)
    return found


def untied(model):
    """A copy whose head has a separate weight, so that autograd sees its use as the head alone."""
    model = copy.deepcopy(model)
    head = head_of(model)
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return model


@pytest.mark.parametrize("kind", MAKERS)
def test_token_gradients_of_the_head(kind: str) -> None:
    model = language_model(kind)
    names = cases("head")
    scored = lgm.score_generation(model, PROMPTS, ANSWERS, {name: name for name in names}, batch_size=2)
    slow = untied(model)
    for number in range(len(PROMPTS)):
        logits, answer = answer_logits(slow, number)
        for name, (objective, statistic) in names.items():
            expected = []
            for loss in OBJECTIVES[objective](logits, answer):
                (gradient,) = torch.autograd.grad(loss, head_of(slow).weight, retain_graph=True)
                expected.append(torch.linalg.vector_norm(gradient, NORMS[statistic]))
            sign = -1 if objective == "uniform" else 1
            torch.testing.assert_close(scored.tokens[name][number], sign * torch.stack(expected), **FLOAT32_INSIDE)


def gradients_of_sequence(model, number: int, objective: str, parameters) -> torch.Tensor:
    """All entries of the gradient of one sequence's mean loss."""
    logits, answer = answer_logits(model, number)
    loss = OBJECTIVES[objective](logits, answer).mean()
    gradients = torch.autograd.grad(loss, parameters)
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_gradients_of_sequences(kind: str) -> None:
    """The head's use of its weight, all parameters, and a pattern."""
    model = language_model(kind)
    slow = untied(model)
    names = [*cases("head"), *cases("all"), "grand(target='*weight')"]
    scores = {name: name for name in names}
    scored = lgm.score_generation(model, PROMPTS, ANSWERS, scores, batch_size=2, aggregates=("gradient",))
    for number in range(len(PROMPTS)):
        for name, (objective, statistic) in {**cases("head"), **cases("all")}.items():
            of_head = "target=head" in name
            where = slow if of_head else model
            parameters = [head_of(slow).weight] if of_head else list(model.parameters())
            entries = gradients_of_sequence(where, number, objective, parameters)
            expected = torch.linalg.vector_norm(entries, NORMS[statistic])
            sign = -1 if objective == "uniform" else 1
            found = scored.table.column(f"{name}/gradient" if of_head else name)[number].as_py()
            assert found == pytest.approx(sign * float(expected), rel=2e-5), (name, number)
        weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
        expected = gradients_of_sequence(model, number, "grand", weights).norm()
        assert scored.values["grand(target='*weight')"][number] == pytest.approx(float(expected), rel=2e-5)


@pytest.mark.parametrize("kind", ["tied", "soft cap", "scale", "learned positions"])
def test_both_uses_of_a_tied_weight(kind: str) -> None:
    model = language_model(kind)
    scores = {name: name for name in cases("tied")}
    scored = lgm.score_generation(model, PROMPTS, ANSWERS, scores, batch_size=2)
    for number in range(len(PROMPTS)):
        for name, (objective, statistic) in cases("tied").items():
            entries = gradients_of_sequence(model, number, objective, [head_of(model).weight])
            sign = -1 if objective == "uniform" else 1
            expected = sign * float(torch.linalg.vector_norm(entries, NORMS[statistic]))
            assert scored.values[name][number] == pytest.approx(expected, rel=2e-5), (name, number)


def state_scores(model):
    return lgm.score_generation(
        model, PROMPTS, ANSWERS, ["semgrad", "hybridgrad", "hybridgrad(target=tied)"], batch_size=2
    )


def published_semgrad(model, number: int, head: torch.nn.Linear, token: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """SemGrad and HybridGrad of one sequence, as the published code computes them: a loop over samples and layers."""
    ids = torch.tensor([PROMPTS[number] + ANSWERS[number]])
    output = model(ids, output_hidden_states=True)
    answer = torch.tensor(ANSWERS[number])
    logits = output.logits[0, -len(answer) - 1 : -1]
    log_p = logits.log_softmax(-1)
    entropies = -(log_p.exp() * log_p).sum(-1).detach()
    loss = (entropies * F.cross_entropy(logits, answer, reduction="none")).mean()
    states = output.hidden_states
    layers = len(states) - 1
    sizes = []
    for state in states[layers - layers // 2 : layers]:
        (gradient,) = torch.autograd.grad(loss, state, retain_graph=True)
        sizes.append(gradient[0, len(PROMPTS[number]) + token].abs().mean())
    semgrad = torch.stack(sizes).mean()
    (weight,) = torch.autograd.grad(loss, head.weight)
    share = torch.exp(-entropies.mean())
    return semgrad, share * weight.abs().mean() + (1 - share) * semgrad


@pytest.mark.parametrize("kind", ["tied", "soft cap", "scale"])
def test_semgrad_and_hybridgrad(kind: str) -> None:
    model = language_model(kind)
    before = state_of(model)
    scored = state_scores(model)
    assert_same_state(before, model)
    slow = untied(model)
    for number in range(len(PROMPTS)):
        semgrad, tied = published_semgrad(model, number, head_of(model))
        _, of_head = published_semgrad(slow, number, head_of(slow))
        for name, expected in {"semgrad": semgrad, "hybridgrad(target=tied)": tied, "hybridgrad": of_head}.items():
            assert scored.values[name][number] == pytest.approx(float(expected), rel=2e-5), (name, number)
    again = state_scores(model)
    torch.testing.assert_close(again.values["semgrad"], scored.values["semgrad"])
