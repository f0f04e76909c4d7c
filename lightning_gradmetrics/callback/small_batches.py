"""Scores small batches together: for a few rows, calling a score takes much longer than its arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.results.finite import finite_rows
from lightning_gradmetrics.results.rows import Rows
from lightning_gradmetrics.scoring.batch import ObservedBatch
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.recipes import RECIPES, Score
from lightning_gradmetrics.scoring.scorer import Scorer

__all__ = ["MOST_ENTRIES", "SmallBatches", "are_separable"]

MOST_ENTRIES = 2**18
"""The number of inputs, logits and features from which batches are scored: 4,500 rows of 16 inputs, 32 features and 10 logits."""

MOST_BATCHES = 4096
"""The largest number of batches without scores; each takes about 3 kB, also if it has one row."""

FEW_INPUTS = 2**12
"""Inputs of a batch up to this size are kept and tested for NaN and Inf with the scores; larger ones are tested at once."""


def are_separable(scores: Sequence[Score]) -> bool:
    """Return whether every score is a registered function of this package, which treats each sample alone.

    A function of the user may depend on the whole batch.

    Args:
        scores: The scores.

    Example:
        >>> from lightning_gradmetrics.scoring.registry import resolve
        >>> are_separable(resolve("energy")), are_separable(resolve({"mine": lambda evidence: evidence.logits.amax(1)}))
        (True, False)
    """
    return all(map(_is_separable, scores))


def _is_separable(score: Score) -> bool:
    if type(score) is not Score or RECIPES.get(score.recipe.name) is not score.recipe:
        return False
    is_own = score.recipe.method.__module__.startswith(f"{__name__.partition('.')[0]}.scores.")
    return is_own and all(isinstance(value, (str, int, float, type(None))) for value in score.arguments.values())


@dataclass(frozen=True)
class _Part:
    """One batch, or several joined.

    Args:
        evidence: The evidence.
        index: The index of each row ``(N,)``.
        ids: The id of each sample, if the rows have ids.
        inputs: The model's inputs, if they are one small tensor.
        finite: Otherwise, whether the inputs of each row are free of NaN and Inf ``(N,)``.
    """

    evidence: Evidence
    index: Tensor
    ids: Sequence[str]
    inputs: Tensor | None
    finite: Tensor | None


class SmallBatches:
    """The last batches of one dataset, whose scores are computed in one call.

    The rows are those of separate calls, up to rounding in float64, in which float32 logits are scored. If the joint call
    fails, each batch is scored alone, so that the rows before the batch that fails are kept.

    Args:
        scorer: Computes the scores, which are separable.
        table: Receives the rows.
    """

    def __init__(self, scorer: Scorer, table: Rows) -> None:
        self._scorer, self._table = scorer, table
        self._parts: list[_Part] = []
        self._kind: Any = None
        self._entries = 0
        self.rows = 0
        """The number of rows without scores."""

    @staticmethod
    def accepts(batch: ObservedBatch, evidence: Evidence) -> bool:
        """Return whether a batch can be scored together with others: samples, float32 logits, no evidence of the network.

        Args:
            batch: The batch.
            evidence: Its evidence.
        """
        logits = evidence.given_logits
        if batch.tokens is not None or logits.ndim != 2 or logits.dtype != torch.float32:
            return False
        if evidence.gradients or evidence.probes or not isinstance(evidence.given_slope, float):
            return False
        return evidence.given_features is None or isinstance(evidence.given_features, Tensor)

    def add(self, batch: ObservedBatch, evidence: Evidence, index: Tensor, ids: Sequence[str]) -> None:
        """Add a batch.

        Args:
            batch: The batch.
            evidence: Its evidence.
            index: The index of each sample ``(N,)``.
            ids: The id of each sample, if the rows have ids.
        """
        inputs = _few_inputs(batch)
        kind = _kind(evidence, inputs)
        if kind != self._kind:
            self.settle()
        finite = finite_rows(batch.inputs, (), batch.size) if inputs is None else None
        self._parts.append(_Part(evidence, index, ids, inputs, finite))
        self._kind = kind
        self.rows += batch.size
        for tensor in (inputs, evidence.given_logits, evidence.given_features):
            self._entries += tensor.numel() if isinstance(tensor, Tensor) else 0
        if self._entries >= MOST_ENTRIES or len(self._parts) >= MOST_BATCHES:
            self.settle()

    def settle(self) -> None:
        """Compute the scores of all batches, and add their rows to the table."""
        if len(self._parts) > 1:
            self._settle_together()
        while self._parts:
            part = self._parts.pop(0)
            self.rows -= len(part.index)
            try:
                scores = self._scorer(part.evidence)
            except Exception:  # later rows would not exist if each batch were scored at once
                self._parts, self.rows = [], 0
                raise
            self._keep(part, scores)
        self._entries = 0

    def _settle_together(self) -> None:
        """Score all batches in one call; leaves them if that fails."""
        joined = _joined(self._parts)
        try:
            values = self._scorer(joined.evidence)
        except Exception:  # raised again for the batch that causes it
            return
        self._parts, self.rows = [], 0
        self._keep(joined, values)

    def _keep(self, part: _Part, scores: dict[str, Tensor]) -> None:
        logits = part.evidence.given_logits
        finite = finite_rows(part.inputs, (logits, *scores.values()), len(logits)).to(logits.device)
        if part.finite is not None:
            finite = finite & part.finite.to(logits.device)
        self._table.keep(part.index, finite, logits, part.evidence.given_labels, scores, ids=part.ids)


def _few_inputs(batch: ObservedBatch) -> Tensor | None:
    """Return the inputs if they are one small tensor with a row per sample, copied when the model was called."""
    inputs = batch.inputs
    if batch.called is None or not isinstance(inputs, Tensor) or inputs.is_nested or inputs.layout != torch.strided:
        return None
    has_rows = inputs.ndim > 0 and len(inputs) == batch.size
    return inputs if has_rows and inputs.numel() <= FEW_INPUTS else None


def _kind(evidence: Evidence, inputs: Tensor | None) -> tuple[Any, ...]:
    """Return what batches have in common if they can be joined."""
    kind: list[Any] = [evidence.one_logit, evidence.given_slope]
    for tensor in (inputs, evidence.given_logits, evidence.given_features, evidence.given_labels):
        kind += [tensor.shape[1:], tensor.dtype, tensor.device] if isinstance(tensor, Tensor) else [None]
    return tuple(kind)


def _joined(parts: Sequence[_Part]) -> _Part:
    """Return the batches as one. The head's weight is left out, because the user may change it between batches."""
    first, all_evidence = parts[0], [part.evidence for part in parts]
    logits = torch.cat([evidence.given_logits for evidence in all_evidence])
    features, labels = _rows_of(all_evidence, "given_features"), _rows_of(all_evidence, "given_labels")
    evidence = Evidence(
        logits, features, labels, one_logit=first.evidence.one_logit, given_slope=first.evidence.given_slope
    )
    ids: list[str] = []
    for part in parts:
        ids += part.ids
    index = torch.cat([part.index for part in parts])
    return _Part(evidence, index, ids, _rows_of(parts, "inputs"), _rows_of(parts, "finite"))


def _rows_of(parts: Sequence[Any], name: str) -> Tensor | None:
    """Return the rows of an attribute of all parts; ``None`` if they do not have it."""
    tensors = [getattr(part, name) for part in parts]
    return None if tensors[0] is None else torch.cat(tensors)
