"""Small language models with random weights, one per kind of head, and sequences of ragged lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.4,
}


class Plain(nn.Module):
    """A causal model outside of transformers, from token ids to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(29, 8)
        self.mixing = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 29)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.mixing(self.embedding(ids))[0])
        return logits


def _of_transformers(kind: str, **changes: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model


def _gpt2() -> nn.Module:
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip(
            "GPT-2 in float64 needs transformers 5: before, its mask overflows, or lets padding read later tokens"
        )
    config = transformers.GPT2Config(
        vocab_size=29, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "untied": lambda: _of_transformers("Llama", tie_word_embeddings=False),
    "tied": lambda: _of_transformers("Llama", tie_word_embeddings=True),
    "bias": lambda: _of_transformers("Phi"),
    "soft cap": lambda: _of_transformers("Gemma2", head_dim=4, final_logit_softcapping=3.0),
    "scale": lambda: _of_transformers("Cohere", logit_scale=0.25),
    "division": lambda: _of_transformers("Granite", logits_scaling=4.0),
    "learned positions": _gpt2,
    "plain": Plain,
}


def language_model(kind: str = "untied") -> nn.Module:
    """Return a model in float64 and eval mode, with the same weights each time."""
    torch.manual_seed(0)
    return MAKERS[kind]().double().eval()


PROMPTS = [[1, 5, 7], [2, 3], [1, 9, 9, 4]]
ANSWERS = [[4, 6, 25], [8, 8, 8, 1, 3], [7]]


def answer_logits(model: nn.Module, number: int) -> tuple[Tensor, Tensor]:
    """The logits that predict the tokens of an answer, ``(T, V)``, and the tokens: one sequence, no padding."""
    ids = torch.tensor([PROMPTS[number] + ANSWERS[number]])
    output = model(ids)
    logits = output if isinstance(output, Tensor) else output.logits
    answer = torch.tensor(ANSWERS[number])
    return logits[0, -len(answer) - 1 : -1], answer


def head_of(model: nn.Module) -> nn.Linear:
    """The head."""
    found = model.head if isinstance(model, Plain) else model.get_output_embeddings()  # type: ignore[operator]
    assert isinstance(found, nn.Linear)
    return found
