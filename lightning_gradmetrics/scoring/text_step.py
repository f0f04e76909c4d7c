"""Turns a batch of a causal language model into scored tokens; handles the shift between logits and labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import Inputs, call, map_tensors, preserved
from lightning_gradmetrics.classifier.observation import redirected
from lightning_gradmetrics.engine.api import eager
from lightning_gradmetrics.gradients.head_features import HeadFeatures
from lightning_gradmetrics.gradients.objectives import IGNORED
from lightning_gradmetrics.scoring.agreement import are_close
from lightning_gradmetrics.scoring.batch import ObservedBatch, ScoredTokens
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.fitted import FittedScore
from lightning_gradmetrics.scoring.padding import check_unmasked, padding_of
from lightning_gradmetrics.scoring.recipes import Score
from lightning_gradmetrics.scoring.scorer import Scorer

__all__ = ["TextReader", "labels_of_call", "not_in_batches_of_texts", "sequence_values", "token_ids", "token_values"]

BLOCK_LOGITS = 2**22
"""Number of logits per block of tokens: 32 MiB in float64."""


def token_ids(batch: ObservedBatch) -> Tensor | None:
    """Return the token ids ``(N, T)`` behind logits ``(N, V, T)``; ``None`` if the batch does not contain texts."""
    if batch.logits.ndim != 3 or batch.inputs is None:
        return None
    named = _named(batch)
    ids = named.get("input_ids", next(iter(named.values()), None))
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        return None
    return ids if len(ids) == len(batch.logits) else None


def labels_of_call(batch: ObservedBatch) -> Tensor | None:
    """Return the argument ``labels`` ``(N, T)`` of the observed call, as models of transformers take it; ``None`` without it."""
    labels = _named(batch).get("labels")
    if not isinstance(labels, Tensor) or labels.shape != (len(batch.logits), batch.logits.shape[2]):
        return None
    return None if labels.is_floating_point() else labels


def _named(batch: ObservedBatch) -> dict[Any, Any]:
    """Return the arguments of the observed call by name; positional ones get their names from the signature."""
    inputs: Any = (batch.inputs,) if isinstance(batch.inputs, Tensor) else batch.inputs
    if isinstance(inputs, tuple) and len(inputs) == 1 and isinstance(inputs[0], Mapping):
        return dict(inputs[0])
    names: list[Any] = [] if batch.called is None else list(inspect.signature(batch.called.forward).parameters)
    named = {}
    for key, value in inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs):
        is_position = isinstance(key, int) and key < len(names)
        named[names[key] if is_position else key] = value
    return named


def not_in_batches_of_texts(scores: Sequence[Score]) -> str:
    """Return which scores, or the profile, are undefined in a batch of texts, and which are defined."""
    names = []
    for score in scores:
        is_of_texts = score.needs.of_texts
        if (score.needs.probes and not is_of_texts) or (is_of_texts and isinstance(score, FittedScore)):
            names.append(score.name)
    return (
        f"{', '.join(names) or 'the profile'}: not defined for texts. Allowed: scores of the logits and of the head, per token; "
        "scores of gradients of the whole network that need no fit, semgrad and hybridgrad, per text"
    )


class TextReader:
    """Reads the batches of a causal language model and determines which logits predict which tokens.

    The logits at position t predict the token at t + 1. Labels are either aligned with ``input_ids``, as Hugging Face
    models take them, or already shifted by one, ``labels[t] = input_ids[t + 1]``; a comparison with the ids shows
    which. A negative label, such as -100, and padding are not scored. The first token of a text has no prediction.

    Args:
        model: The model that is scored.
        logits_of: Returns the logits ``(N, V, T)`` from the model's output.
    """

    def __init__(self, model: nn.Module, logits_of: Callable[[Any], Tensor]) -> None:
        self.model = model
        self.logits_of = logits_of
        self._is_aligned: bool | None = None
        self._is_causal = False

    def batch(self, batch: ObservedBatch, ids: Tensor, labels: Tensor | None, others: Any = None) -> ObservedBatch:
        """Return the batch with one row per scored token.

        Args:
            batch: An observed batch with logits ``(N, V, T)``.
            ids: The token ids ``(N, T)``.
            labels: The labels ``(N, T)``, or ``None`` to score every token that is not padding.
            others: The other entries of the batch, which may contain the ``attention_mask`` if the call does not.

        Raises:
            ValueError: If the model is not causal, the labels are not those of next tokens, texts are padded on the left
                without ``position_ids``, or padding is not marked.
        """
        _check_shapes(batch, ids, labels)
        named = _named(batch)
        if "attention_mask" not in named and isinstance(others, Mapping):
            named["attention_mask"] = others.get("attention_mask")
        padding = padding_of(named)
        if padding is None:
            check_unmasked(self.model, ids, labels)
        padding = torch.zeros_like(ids, dtype=torch.bool) if padding is None else padding.to(ids.device)
        if not self._is_causal:
            self._check_causal(batch, ids, padding)
        next_tokens = self._next_tokens(ids, padding, None if labels is None else labels.to(ids.device))
        return _as_rows(batch, next_tokens.to(batch.logits.device), ids.masked_fill(padding, IGNORED))

    def _next_tokens(self, ids: Tensor, padding: Tensor, labels: Tensor | None) -> Tensor:
        """Return the token that each position predicts ``(N, T)``; -100 where the prediction is not scored."""
        known = ids if labels is None else labels
        known = known.long().masked_fill((known < 0) | padding, IGNORED)
        if labels is not None and not self._aligned(ids, known):
            known[:, :-1] = known[:, :-1].masked_fill(padding[:, 1:], IGNORED)
            return known
        following = torch.full_like(known, IGNORED)
        following[:, :-1] = known[:, 1:]
        return following.masked_fill(padding, IGNORED)

    def _aligned(self, ids: Tensor, labels: Tensor) -> bool:
        """Return true if the labels are aligned with the ids, false if they are shifted by one."""
        known = labels != IGNORED
        fits = {
            True: bool((labels == ids)[known].all()),
            False: bool((labels[:, :-1] == ids[:, 1:])[known[:, :-1]].all()),
        }
        if self._is_aligned is None and fits[True] != fits[False]:
            self._is_aligned = fits[True]
        chosen = self._is_aligned is not False
        if not fits[chosen]:
            raise ValueError(
                "the labels are not the tokens that follow: expected labels equal to input_ids, as models of Hugging Face "
                "take them, or in every batch shifted by one, labels[:, t] = input_ids[:, t + 1]; in both -100 where a token "
                "is not scored. Scores of other labels of tokens come from lightning_gradmetrics.score"
            )
        return chosen

    def _check_causal(self, batch: ObservedBatch, ids: Tensor, padding: Tensor) -> None:
        """Refuse a model whose logits depend on later tokens; tested by one forward pass on the first text with two tokens."""
        long = ((~padding).sum(1) > 1).nonzero().flatten()
        if not len(long):
            return
        row = int(long[0])
        last = int((~padding[row]).nonzero().max())
        logits = self._with_other_token(batch, ids, row, last)
        if not are_close(logits[0, :, :last], batch.logits[row, :, :last]):
            raise ValueError(
                f"the logits of {type(self.model).__name__} depend on later tokens, so it is not a causal language model, and "
                "no position predicts its next token. Scores of tokens of other models come from lightning_gradmetrics.score"
            )
        self._is_causal = True

    def _with_other_token(self, batch: ObservedBatch, ids: Tensor, row: int, place: int) -> Tensor:
        """Return the logits ``(1, V, T)`` of one text with one token replaced."""

        def changed(tensor: Tensor) -> Tensor:
            has_rows = tensor.ndim > 0 and len(tensor) == len(ids)
            taken = tensor[row : row + 1].clone() if has_rows else tensor.clone()
            if tensor is ids:
                taken[0, place] = (taken[0, place] + 1) % batch.logits.shape[1]
            return taken

        inputs: Inputs = map_tensors(batch.inputs, changed)  # type: ignore[arg-type]
        called = batch.called or self.model
        with preserved(self.model), torch.no_grad(), eager(), redirected(self.model, called):
            return self.logits_of(call(self.model, inputs))


def _check_shapes(batch: ObservedBatch, ids: Tensor, labels: Tensor | None) -> None:
    shape = (len(batch.logits), batch.logits.shape[2])
    if tuple(ids.shape) != shape or (labels is not None and labels.shape != ids.shape):
        told = "none" if labels is None else str(tuple(labels.shape))
        raise ValueError(
            f"the logits have {shape[1]} positions (N = {shape[0]}), the token ids {tuple(ids.shape)} and the labels {told}; "
            "expected one position per token: a model must not add or drop positions (prompt tuning, logits_to_keep)"
        )
    if int(ids.max()) >= batch.logits.shape[1]:
        raise ValueError(
            f"the logits have {batch.logits.shape[1]} columns but a token id is {int(ids.max())}, so they are not logits of the "
            "vocabulary; scores of other models of tokens come from lightning_gradmetrics.score"
        )


def _as_rows(batch: ObservedBatch, next_tokens: Tensor, context: Tensor) -> ObservedBatch:
    """Return the batch with the logits and features of the positions whose next token is scored."""
    keep = next_tokens >= 0
    lengths = keep.sum(1)
    features = batch.features
    if isinstance(features, HeadFeatures):
        features = features.dense()
    if features is not None:
        features = features.movedim(1, -1)[keep]
    ids = next_tokens[keep]
    positions = keep.nonzero()[:, 1] + 1
    ood = None if batch.ood is None else batch.ood.to(lengths.device).repeat_interleave(lengths)
    tokens = ScoredTokens(ids, positions, lengths, context)
    logits = batch.logits.movedim(1, -1)[keep]
    slope = batch.slope.movedim(1, -1)[keep] if isinstance(batch.slope, Tensor) else batch.slope
    return replace(batch, logits=logits, features=features, slope=slope, labels=ids, ood=ood, tokens=tokens)


def token_values(scorer: Scorer, evidence: Evidence) -> dict[str, Tensor]:
    """Return the scores of tokens by name, ``(M,)`` each, in blocks of tokens.

    Args:
        scorer: The scorer.
        evidence: Evidence with one row per token.
    """
    of_tokens = scorer.of_tokens()
    parts: dict[str, list[Tensor]] = {score.name: [] for score in of_tokens.scores}
    for block in _blocks(evidence):
        for name, values in of_tokens(block).items():
            parts[name].append(values)
    return {name: torch.cat(values) for name, values in parts.items()}


def _blocks(evidence: Evidence) -> Iterator[Evidence]:
    count, classes = evidence.given_logits.shape
    rows = torch.arange(count, device=evidence.given_logits.device)
    for block in rows.split(max(1, BLOCK_LOGITS // classes)):  # type: ignore[no-untyped-call]
        yield evidence.rows(block)


def sequence_values(values: Tensor, lengths: Tensor, name: str) -> Tensor:
    """Return an aggregate of the tokens of each sequence ``(N,)``, in float64; NaN for a sequence without tokens.

    Args:
        values: Scores of tokens ``(M,)``, one sequence after the other.
        lengths: The number of tokens of each sequence ``(N,)``.
        name: ``"mean"``, ``"sum"``, ``"max"`` or ``"min"``.

    Example:
        >>> sequence_values(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2, 0, 1]), "mean")
        tensor([2., nan, 5.], dtype=torch.float64)
    """
    total = torch.segment_reduce(values.double(), name, lengths=lengths, axis=0)
    return total.masked_fill(lengths == 0, torch.nan)
