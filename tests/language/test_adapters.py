"""Adapters of peft: scores over their parameters alone."""

from __future__ import annotations

import pytest
import torch

import lightning_gradmetrics as lgm
from tests.language.language_models import ANSWERS, PROMPTS, language_model
from tests.models import fast_rows

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft reads it


def adapted(kind: str = "untied") -> torch.nn.Module:
    """A model with adapters on two projections of every layer, none of them zero."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]
    )
    model = peft.get_peft_model(language_model(kind), config).double().eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def gradient_norms(model: torch.nn.Module, number: int) -> dict[str, torch.Tensor]:
    """L2 norms of the gradient of the answer's mean cross-entropy by autograd, over the adapters and over all parameters."""
    named = {name: p.requires_grad_(True) for name, p in model.named_parameters()}
    answer = torch.tensor(ANSWERS[number])
    logits = model(torch.tensor([PROMPTS[number] + ANSWERS[number]])).logits[0, -len(answer) - 1 : -1]
    gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, answer), list(named.values()))
    squares = {name: gradient.square().sum() for name, gradient in zip(named, gradients, strict=True)}
    adapters = [value for name, value in squares.items() if "lora_" in name]
    return {"lora": torch.stack(adapters).sum().sqrt(), "all": torch.stack(list(squares.values())).sum().sqrt()}


@pytest.mark.parametrize("kind", fast_rows(["untied", "tied"], ["tied"]))
def test_gradients_of_adapters_are_those_of_autograd(kind: str) -> None:
    model = adapted(kind)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    scored = lgm.score_generation(model, PROMPTS, ANSWERS, {"lora": "grand(target='*lora_*')", "all": "grand"})
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    for number in range(len(ANSWERS)):
        for name, expected in gradient_norms(model, number).items():
            torch.testing.assert_close(scored.values[name][number].double(), expected, rtol=1e-5, atol=1e-8)


def test_tokens_and_semgrad_of_an_adapted_model_are_those_of_the_merged_one() -> None:
    model, scores = adapted(), ["nll", "gradnorm", "pseudo_label", "semgrad"]
    found = lgm.score_generation(model, PROMPTS, ANSWERS, scores)
    expected = lgm.score_generation(model.merge_and_unload(), PROMPTS, ANSWERS, scores)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-9)
    for name in scores[:3]:
        torch.testing.assert_close(list(found.tokens[name]), list(expected.tokens[name]), rtol=1e-5, atol=1e-9)
