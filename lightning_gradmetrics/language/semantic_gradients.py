"""SemGrad and HybridGrad: gradients of an answer's loss with respect to the hidden states of one prompt token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.objectives import class_loss, log_probabilities
from lightning_gradmetrics.language.embedding_gradients import (
    DifferentiableCall,
    differentiable_call,
    tied_scale,
    uses_by_sequence,
)
from lightning_gradmetrics.language.model import LanguageModel
from lightning_gradmetrics.language.sequence_gradients import SequenceFactors, sequence_moments
from lightning_gradmetrics.language.sequences import Padded

__all__ = ["SEMANTIC_SCORES", "HybridGrad", "SemGrad", "SemanticScore"]


@dataclass(frozen=True)
class SemGrad:
    r"""Mean absolute gradient of the answer's loss at the hidden states of one prompt token.

    The loss is the mean over the answer's tokens of ``H_t CE_t``: the entropy of the prediction, held constant, times
    the cross-entropy of the token. The mean is taken over the width and over the upper half of the hidden states except
    the last one, ``l = L - floor(L / 2) ... L - 1`` for L layers. The whole batch takes one backward pass.

    Args:
        semantic_token: The prompt token, counted from the end of the prompt: -1 is the last one. The paper uses the
            last token of the question; with a chat template after it, that is -4 for Llama-3, -3 for Qwen, -2 for
            Mistral.

    Reference:
        The method and its code: https://github.com/mingdali6717/SemGrad
    """

    semantic_token: int = -1

    def __call__(self, model: LanguageModel, batch: Padded) -> Tensor:
        """Return the score of each sequence, ``(N,)``."""
        with _semantic_pass(model, batch, self.semantic_token) as result:
            return result.at_prompt_token()


@dataclass(frozen=True)
class HybridGrad:
    r"""A mixture of SemGrad and the mean absolute gradient of the head's weight: ``a |dL/dW| + (1 - a) SemGrad``.

    Both are gradients of the same loss; ``a = exp(-mean H_t)`` over the answer's tokens.

    Args:
        semantic_token: As in :class:`SemGrad`.
        target: ``"head"``, the weight's use as the head; or ``"tied"``, both uses of a tied weight, which the published
            code computes for models with tied weights.

    Reference:
        The method and its code: https://github.com/mingdali6717/SemGrad
    """

    semantic_token: int = -1
    target: Literal["head", "tied"] = "head"

    def __call__(self, model: LanguageModel, batch: Padded) -> Tensor:
        """Return the score of each sequence, ``(N,)``."""
        if self.target not in ("head", "tied"):
            raise ValueError(f"hybridgrad: target={self.target!r}; allowed: 'head', 'tied'")
        with _semantic_pass(model, batch, self.semantic_token) as result:
            share = torch.exp(-result.mean_entropies())
            return share * result.of_head(self.target == "tied") + (1 - share) * result.at_prompt_token()


SemanticScore = SemGrad | HybridGrad

SEMANTIC_SCORES: dict[str, Callable[..., SemanticScore]] = {"semgrad": SemGrad, "hybridgrad": HybridGrad}
"""Scores of hidden states by name."""


class _SemanticPass:
    """The entropy-weighted losses of the answers of a differentiable forward pass.

    Args:
        model: The model.
        batch: The batch.
        tokens: The position of the prompt token in each sequence.
        result: The forward pass.
    """

    def __init__(self, model: LanguageModel, batch: Padded, tokens: Tensor, result: DifferentiableCall) -> None:
        self.model, self.batch, self.tokens, self.result = model, batch, tokens, result
        logits = result.rows.logits.double()
        log_p = log_probabilities(logits)
        self.entropies = -(log_p.exp() * log_p).sum(1).detach()
        self.losses = self.entropies * class_loss(logits, result.rows.labels)

    def mean_entropies(self) -> Tensor:
        """Return the mean entropy of each answer's tokens."""
        return self._means(self.entropies)

    def total(self) -> Tensor:
        """Return the sum of the sequences' losses."""
        return self._means(self.losses).sum()

    def _means(self, values: Tensor) -> Tensor:
        means = []
        for answer in values.split(self.result.rows.lengths):  # type: ignore[no-untyped-call]
            means.append(answer.mean())
        return torch.stack(means)

    def at_prompt_token(self) -> Tensor:
        """Return the mean absolute gradient at the prompt token, over the upper hidden states."""
        states = self.result.call.hidden_states
        layers = len(states) - 1
        chosen = states[layers - layers // 2 : layers]
        if not chosen:
            raise ValueError(f"semgrad needs a model with at least 2 layers; this one has {layers}")
        rows = torch.arange(len(self.tokens), device=chosen[0].device)
        sizes = []
        for gradient in torch.autograd.grad(self.total(), chosen, retain_graph=True):
            sizes.append(gradient[rows, self.tokens.to(gradient.device)].double().abs().mean(1))
        return torch.stack(sizes).mean(0)

    def of_head(self, tied: bool) -> Tensor:
        """Return the mean absolute gradient of the head's weight."""
        rows, wanted = self.result.rows, (self.result.rows.logits, self.result.embedded)
        output, delta = torch.autograd.grad(self.total(), wanted, retain_graph=True)
        output = output.double() * rows.slope
        uses: list[Any] = [None] * len(rows.lengths)
        if tied:
            scaled = tied_scale(self.model) * delta
            uses = list(uses_by_sequence(scaled, self.batch, self.model.embedding.padding_idx))
        outputs = output.split(rows.lengths)  # type: ignore[no-untyped-call]
        features_of_sequences = rows.features.detach().split(rows.lengths)  # type: ignore[no-untyped-call]
        means = []
        for output_gradient, features, use in zip(outputs, features_of_sequences, uses, strict=True):
            factors = SequenceFactors(output_gradient, features, use)
            means.append(sequence_moments(factors, [1.0])[1.0] / factors.count)
        return torch.stack(means)


@contextmanager
def _semantic_pass(model: LanguageModel, batch: Padded, semantic_token: int) -> Iterator[_SemanticPass]:
    tokens = _token_positions(batch, semantic_token)
    with differentiable_call(model, batch, hidden_states=True) as result:
        yield _SemanticPass(model, batch, tokens, result)


def _token_positions(batch: Padded, semantic_token: int) -> Tensor:
    """Return the position of the prompt token in each sequence."""
    positions = []
    for number, sequence in enumerate(batch.sequences):
        position = sequence.prompt + semantic_token
        if not 0 <= position < sequence.prompt:
            raise ValueError(
                f"semantic_token={semantic_token} is outside prompt {number}, which has {sequence.prompt} tokens; allowed: "
                f"-{sequence.prompt} to -1"
            )
        positions.append(position)
    return torch.tensor(positions)
