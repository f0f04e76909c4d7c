"""Backward passes from the losses of a batch of sequences to the embeddings and the hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import gradients_enabled, preserved
from lightning_gradmetrics.classifier.logit_map import recognised_map
from lightning_gradmetrics.engine.api import eager
from lightning_gradmetrics.gradients.objectives import Objective
from lightning_gradmetrics.language.model import HeadCall, LanguageModel, LanguageModelError
from lightning_gradmetrics.language.sequence_gradients import EmbeddingUse
from lightning_gradmetrics.language.sequences import Padded
from lightning_gradmetrics.language.token_rows import TokenRows, answer_rows

__all__ = [
    "DifferentiableCall",
    "differentiable_call",
    "embedding_uses",
    "row_losses",
    "tied_scale",
    "uses_by_sequence",
]

PROBED_ROWS = 64
"""Number of rows of the embedding's weight to compare with its output."""


@dataclass(frozen=True)
class DifferentiableCall:
    """A forward pass that can be differentiated with respect to the embedding's output.

    Args:
        call: The forward pass.
        rows: The rows of the answers' tokens, with their graph.
        embedded: The embedding's output ``(N, T, D)``, a leaf.
    """

    call: HeadCall
    rows: TokenRows
    embedded: Tensor


@contextmanager
def differentiable_call(
    model: LanguageModel, batch: Padded, hidden_states: bool = False
) -> Iterator[DifferentiableCall]:
    """Run the model on a batch with its parameters frozen; gradients are enabled inside the block.

    Args:
        model: The model.
        batch: The batch.
        hidden_states: Whether to return the hidden states.
    """
    leaves: list[Tensor] = []

    def detached(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1]

    with preserved(model.module), gradients_enabled(model.module), eager():
        for parameter in model.module.parameters():
            parameter.requires_grad_(False)
        hook = model.embedding.register_forward_hook(detached)
        try:
            call = model(batch.ids, batch.mask, batch.needed, hidden_states)
        finally:
            hook.remove()
        if len(leaves) != 1:
            raise LanguageModelError(
                f"the input embedding of {type(model.module).__name__} was called {len(leaves)} times in one forward pass; "
                "expected once"
            )
        yield DifferentiableCall(call, answer_rows(call, batch), leaves[0])


def row_losses(objective: Objective, rows: TokenRows) -> Tensor:
    """Return the losses of the tokens ``(M,)``, in float64 if the device supports it."""
    logits = rows.logits if rows.logits.device.type == "mps" else rows.logits.double()
    return objective.loss(rows.labels)(logits)


def embedding_uses(model: LanguageModel, batch: Padded, objectives: list[Objective]) -> list[list[EmbeddingUse]]:
    """Return, for each objective, the gradient of each sequence's mean loss through the input embedding.

    Args:
        model: A model whose head and embedding share one weight.
        batch: The sequences.
        objectives: The losses of a token.
    """
    scale = tied_scale(model)
    results = []
    with differentiable_call(model, batch) as result:
        weights = torch.cat([torch.full((length,), 1 / length) for length in result.rows.lengths])
        for objective in objectives:
            losses = row_losses(objective, result.rows)
            total = (losses * weights.to(losses)).sum()
            (delta,) = torch.autograd.grad(total, result.embedded, retain_graph=True)
            results.append(uses_by_sequence(scale * delta, batch, model.embedding.padding_idx))
    return results


def uses_by_sequence(delta: Tensor, batch: Padded, padding_idx: int | None) -> list[EmbeddingUse]:
    """Return the gradient of each sequence through the embedding, without padding.

    Args:
        delta: The gradient of the embedded rows of the weight ``(N, T, D)``.
        batch: The sequences.
        padding_idx: The token whose embedding has no gradient, or ``None``.
    """
    uses = []
    for row, sequence in enumerate(batch.sequences):
        ids = batch.ids[row, : len(sequence.ids)]
        has_gradient = torch.ones_like(ids, dtype=torch.bool) if padding_idx is None else ids != padding_idx
        uses.append(EmbeddingUse(ids[has_gradient], delta[row, : len(sequence.ids)][has_gradient]))
    return uses


def tied_scale(model: LanguageModel) -> float:
    """Return the factor by which the input embedding scales the rows of a weight that it shares with the head.

    Args:
        model: The model.

    Raises:
        LanguageModelError: If the weight is not shared, or the embedding does more than scale it.
    """
    kind, embedding = type(model.module).__name__, model.embedding
    if getattr(model.head, "weight", None) is not embedding.weight:
        raise LanguageModelError(
            f"target='tied' is for models whose head and input embedding share one weight; {kind} has separate weights: use "
            "target='head' or a pattern of parameter names"
        )
    some = torch.arange(min(PROBED_ROWS, embedding.num_embeddings), device=embedding.weight.device)
    with torch.no_grad():
        logit_map = recognised_map(embedding.weight[some], embedding(some))
    if logit_map is None or logit_map.cap is not None:
        raise LanguageModelError(
            f"the input embedding of {kind} does more than scale the rows of its weight: pass the name of the weight as the "
            "target instead of 'tied'; it has the same gradient"
        )
    return logit_map.scale
