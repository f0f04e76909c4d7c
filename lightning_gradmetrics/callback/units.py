"""Computes the row values of a batch: per sample, per image from its pixels, or per text from its tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_gradmetrics.pictures.pixels.images import further_columns, image_level
from lightning_gradmetrics.pictures.pixels.settings import Pixels
from lightning_gradmetrics.results.rows import FurtherColumns
from lightning_gradmetrics.results.segments import SEGMENT_COLUMNS
from lightning_gradmetrics.results.tokens import LIST_PREFIX, RENAMED, SEQUENCE
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
        further: Further columns of images and texts.
    """

    logits: Tensor
    labels: Tensor | None
    scores: Mapping[str, Tensor]
    maps: Mapping[str, Tensor] | None = None
    further: FurtherColumns | None = None


def row_values(
    scorer: Scorer, batch: ObservedBatch, evidence: Evidence, pixels: Pixels, columns: Sequence[str]
) -> RowValues:
    """Return the values of the rows of a batch.

    Args:
        scorer: Computes the scores.
        batch: The batch.
        evidence: Its evidence.
        pixels: The settings for images.
        columns: The names of further columns, which are defined for samples only.

    Raises:
        ValueError: If further columns are requested and the rows are not samples.
    """
    if batch.tokens is not None:
        return _of_texts(scorer, evidence, batch.tokens, columns)
    values = scorer(evidence)
    if evidence.has_positions:
        logits, scores = image_level(evidence, values, pixels.aggregates[0], columns)
        further = further_columns(evidence, values, pixels)
        _check_names(scores, {*further.values, *SEGMENT_COLUMNS, "class_name"})
        return RowValues(logits, None, scores, values, further)
    return RowValues(batch.logits, batch.labels, values)


def _check_names(scores: Iterable[str], reserved: Collection[str]) -> None:
    """Refuse a score with the name of a column of images, segments, texts or tokens."""
    for name in scores:
        if name in reserved:
            raise ValueError(f"the results of this model have a column {name!r}: rename the score of that name")


def _of_texts(scorer: Scorer, evidence: Evidence, tokens: ScoredTokens, columns: Sequence[str]) -> RowValues:
    if columns:
        raise ValueError(f"columns= names {columns[0]!r}, and further columns are defined for samples, not for texts")
    values, lengths = token_values(scorer, evidence), tokens.lengths
    predicted = evidence.given_prediction
    incorrect = (predicted != tokens.ids).double()
    further = {"tokens": lengths, "error": sequence_values(incorrect, lengths, "mean")}
    lists = {"token_ids": tokens.ids, "predicted_ids": predicted, "positions": tokens.positions}
    scores = dict(tokens.of_texts)
    for name, of_tokens in values.items():
        scores[name] = sequence_values(of_tokens, lengths, "mean")
        lists[f"{LIST_PREFIX}{name}"] = of_tokens
        for aggregate in FURTHER_AGGREGATES:
            further[f"{name}/{aggregate}"] = sequence_values(of_tokens, lengths, aggregate)
    _check_names(scores, {"tokens", "error", SEQUENCE, *RENAMED.values()})
    largest = sequence_values(evidence.given_logits.amax(1), lengths, "max").unsqueeze(1)
    return RowValues(largest, None, scores, further=FurtherColumns(further, lists, lengths, are_texts=True))
