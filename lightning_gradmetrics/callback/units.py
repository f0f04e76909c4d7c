"""Computes the row values of a batch: per sample, per image from its pixels, or per text from its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_gradmetrics.pictures.pixels.images import image_level
from lightning_gradmetrics.results.table import SequenceColumns
from lightning_gradmetrics.results.tokens import LIST_PREFIX
from lightning_gradmetrics.scoring.batch import ObservedBatch, ScoredTokens
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.scorer import Scorer
from lightning_gradmetrics.scoring.text_step import sequence_values, token_values

__all__ = ["RowValues", "row_values"]

FURTHER_AGGREGATES = ("sum", "max")
"""Token aggregates that get a column each; the score's own column has the mean."""


@dataclass(frozen=True)
class RowValues:
    """The values of the rows of a batch.

    Args:
        logits: ``(N, C)``. The largest column is the prediction; NaN and Inf mark the row as not finite.
        labels: ``(N,)``, or ``None``.
        scores: ``(N,)`` by name.
        maps: The scores of positions, ``(N, H, W)`` by name; ``None`` if the model does not classify pixels.
        of_tokens: Further columns of texts.
    """

    logits: Tensor
    labels: Tensor | None
    scores: Mapping[str, Tensor]
    maps: Mapping[str, Tensor] | None = None
    of_tokens: SequenceColumns | None = None


def row_values(
    scorer: Scorer, batch: ObservedBatch, evidence: Evidence, aggregate: str, columns: Sequence[str]
) -> RowValues:
    """Return the values of the rows of a batch.

    Args:
        scorer: Computes the scores.
        batch: The batch.
        evidence: Its evidence.
        aggregate: How the scores of an image's pixels are combined into the image's score.
        columns: The names of further columns, which are defined for samples only.

    Raises:
        ValueError: If further columns are requested and the rows are not samples.
    """
    if batch.tokens is not None:
        return _of_texts(scorer, evidence, batch.tokens, columns)
    values = scorer(evidence)
    if evidence.has_positions:
        logits, scores = image_level(evidence, values, aggregate, columns)
        return RowValues(logits, None, scores, values)
    return RowValues(batch.logits, batch.labels, values)


def _of_texts(scorer: Scorer, evidence: Evidence, tokens: ScoredTokens, columns: Sequence[str]) -> RowValues:
    if columns:
        raise ValueError(f"columns= names {columns[0]!r}, and further columns are defined for samples, not for texts")
    values, lengths = token_values(scorer, evidence), tokens.lengths
    predicted = evidence.given_logits.argmax(1)
    incorrect = (predicted != tokens.ids).double()
    further = {"tokens": lengths, "error": sequence_values(incorrect, lengths, "mean")}
    lists = {"token_ids": tokens.ids, "predicted_ids": predicted, "positions": tokens.positions}
    scores = {}
    for name, of_tokens in values.items():
        scores[name] = sequence_values(of_tokens, lengths, "mean")
        lists[f"{LIST_PREFIX}{name}"] = of_tokens
        for aggregate in FURTHER_AGGREGATES:
            further[f"{name}/{aggregate}"] = sequence_values(of_tokens, lengths, aggregate)
    largest = sequence_values(evidence.given_logits.amax(1), lengths, "max").unsqueeze(1)
    return RowValues(largest, None, scores, of_tokens=SequenceColumns(lengths, lists, further))
