"""SemGrad and HybridGrad: gradients of an answer's loss with respect to the hidden states of one prompt token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import Inputs
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
from lightning_gradmetrics.scoring.evidence import Evidence

__all__ = ["hybridgrad", "semgrad"]


def semgrad(evidence: Evidence, *, semantic_token: int = -1) -> Tensor:
    r"""Mean absolute gradient of the answer's loss at the hidden states of one prompt token.

    The loss is the mean over the answer's tokens of ``H_t CE_t``: the entropy of the prediction, held constant, times
    the cross-entropy of the token. The mean is taken over the width and over the upper half of the hidden states except
    the last one, ``l = L - floor(L / 2) ... L - 1`` for L layers. The whole batch takes one backward pass.

    Args:
        evidence: Evidence of texts.
        semantic_token: The prompt token, counted from the end of the prompt: -1 is the last one. The paper uses the
            last token of the question; with a chat template after it, that is -4 for Llama-3, -3 for Qwen, -2 for
            Mistral.

    Reference:
        The method and its code: https://github.com/mingdali6717/SemGrad
    """
    return evidence.probe(_SemGrad(semantic_token))


def hybridgrad(evidence: Evidence, *, semantic_token: int = -1, target: Literal["head", "tied"] = "head") -> Tensor:
    r"""A mixture of SemGrad and the mean absolute gradient of the head's weight: ``a |dL/dW| + (1 - a) SemGrad``.

    Both are gradients of the same loss; ``a = exp(-mean H_t)`` over the answer's tokens.

    Args:
        evidence: Evidence of texts.
        semantic_token: As in :func:`semgrad`.
        target: ``"head"``, the weight's use as the head; or ``"tied"``, both uses of a tied weight, which the published
            code computes for models with tied weights.

    Reference:
        The method and its code: https://github.com/mingdali6717/SemGrad
    """
    return evidence.probe(_HybridGrad(semantic_token, target == "tied"))


@dataclass(frozen=True)
class _SemGrad:
    """The computation of :func:`semgrad`."""

    semantic_token: int

    def __call__(self, model: nn.Module, inputs: Inputs) -> Tensor:
        raise ValueError(
            f"semgrad and hybridgrad score whole texts, and the inputs of {type(model).__name__} are not a batch of texts: call "
            "lightning_gradmetrics.score_generation(model, prompts, answers, scores), or pass a causal language model and "
            "batches with input_ids, attention_mask and labels to a Trainer"
        )

    def of_texts(self, model: LanguageModel, batch: Padded) -> Tensor:
        """Return the score of each text, ``(N,)``."""
        with _semantic_pass(model, batch, self.semantic_token) as result:
            return result.at_prompt_token().detach()


@dataclass(frozen=True)
class _HybridGrad(_SemGrad):
    """The computation of :func:`hybridgrad`."""

    is_tied: bool

    def of_texts(self, model: LanguageModel, batch: Padded) -> Tensor:
        """Return the score of each text, ``(N,)``."""
        with _semantic_pass(model, batch, self.semantic_token) as result:
            share = torch.exp(-result.mean_entropies())
            mixture = share * result.of_head(self.is_tied) + (1 - share) * result.at_prompt_token()
            return mixture.detach()


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
