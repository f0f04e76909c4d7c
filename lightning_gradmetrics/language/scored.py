"""The scores of generated text: per sequence, per token, and per span of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from lightning_gradmetrics.language.coloured_text import tokens_html
from lightning_gradmetrics.language.sequences import PromptAndAnswer

__all__ = ["AGGREGATES", "ScoredGeneration"]

AGGREGATES = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax, "min": torch.amin}
"""Functions from the tokens' scores ``(T,)`` to one number per sequence, by name."""


@dataclass(frozen=True)
class ScoredGeneration:
    """Scores of answers: higher = more uncertain.

    Args:
        sequences: The sequences, in the given order.
        tokens: For each score of tokens, one tensor ``(T_i,)`` per answer.
        values: Scores of whole sequences ``(N,)``.
        aggregates: The summaries of an answer's tokens in the table.

    Example:
        >>> from lightning_gradmetrics.language.sequences import paired
        >>> scored = ScoredGeneration(tuple(paired([[1]], [[2, 3]])), {"entropy": [torch.tensor([0.5, 1.5])]}, {})
        >>> scored.table.column("entropy/mean").to_pylist(), scored.spans([[(0, 1)]]).column("entropy/max").to_pylist()
        ([1.0], [0.5])
    """

    sequences: tuple[PromptAndAnswer, ...]
    tokens: Mapping[str, Sequence[Tensor]]
    values: Mapping[str, Tensor]
    aggregates: tuple[str, ...] = ("mean", "max")

    @property
    def table(self) -> pa.Table:
        """One row per sequence.

        Columns: ``index``; the numbers of tokens ``prompt_tokens`` and ``tokens``; for each score of tokens
        ``<score>/mean`` and ``<score>/max``; scores of sequences under their names; and the lists ``token_ids`` and
        ``tokens/<score>``, one entry per token of the answer.
        """
        columns: dict[str, Any] = {"index": range(len(self.sequences)), "prompt_tokens": [], "tokens": []}
        token_ids = []
        for sequence in self.sequences:
            columns["prompt_tokens"].append(sequence.prompt)
            columns["tokens"].append(len(sequence.answer))
            token_ids.append(sequence.answer.tolist())
        for name, answers in self.tokens.items():
            columns.update(_summaries(name, answers, self.aggregates))
        for name, values in self.values.items():
            columns[name] = values.tolist()
        columns["token_ids"] = pa.array(token_ids, pa.list_(pa.int32()))
        for name, answers in self.tokens.items():
            columns[f"tokens/{name}"] = _lists(answers)
        return pa.table(columns)

    def html(self, score: str, decode: Callable[[list[int]], str]) -> str:
        """Return the answers as HTML, one paragraph each, with every token coloured by the rank of its score in the answer.

        Args:
            score: The name of a score of tokens.
            decode: A function from token ids to text, such as ``tokenizer.decode``.

        Raises:
            ValueError: If there is no such score of tokens, or a value is not finite.

        Example:
            >>> from lightning_gradmetrics.language.sequences import paired
            >>> scored = ScoredGeneration(tuple(paired([[1]], [[2, 3]])), {"entropy": [torch.tensor([0.5, 1.5])]}, {})
            >>> scored.html("entropy", lambda ids: f"<{ids[0]}>").count("&lt;")
            2
        """
        if score not in self.tokens:
            raise ValueError(
                f"the answers have no token scores {score!r}; available: {', '.join(self.tokens) or 'none'}"
            )
        paragraphs = []
        for sequence, values in zip(self.sequences, self.tokens[score], strict=True):
            texts = []
            for token in sequence.answer.tolist():
                texts.append(decode([token]))
            paragraphs.append(tokens_html(texts, values.tolist()))
        return "\n".join(paragraphs)

    def spans(self, spans: Sequence[Sequence[tuple[int, int]]]) -> pa.Table:
        """Return a table with one row per span of an answer, such as a claim.

        Args:
            spans: For each answer its spans ``(start, end)`` in tokens of the answer; ``end`` is exclusive.

        Raises:
            ValueError: If the number of lists differs from that of answers, or a span is empty or outside its answer.
        """
        if len(spans) != len(self.sequences):
            raise ValueError(
                f"there are {len(self.sequences)} answers but {len(spans)} lists of spans; give one list per answer"
            )
        all_spans = []
        for number, (sequence, ranges) in enumerate(zip(self.sequences, spans, strict=True)):
            for start, end in ranges:
                _check_span(number, start, end, len(sequence.answer))
                all_spans.append((number, start, end))
        numbers, starts, ends = zip(*all_spans, strict=True) if all_spans else ((), (), ())
        columns: dict[str, Any] = {
            "index": pa.array(numbers, pa.int64()),
            "start": pa.array(starts, pa.int64()),
            "end": pa.array(ends, pa.int64()),
        }
        for name, answers in self.tokens.items():
            parts = []
            for number, start, end in all_spans:
                parts.append(answers[number][start:end])
            columns.update(_summaries(name, parts, self.aggregates))
        return pa.table(columns)


def _summaries(name: str, answers: Sequence[Tensor], aggregates: Sequence[str]) -> dict[str, pa.Array]:
    columns: dict[str, pa.Array] = {}
    for aggregate in aggregates:
        values = []
        for answer in answers:
            values.append(float(AGGREGATES[aggregate](answer.double())))  # type: ignore[operator]
        columns[f"{name}/{aggregate}"] = pa.array(values, pa.float64())
    return columns


def _lists(answers: Sequence[Tensor]) -> pa.Array:
    values = []
    for answer in answers:
        values.append(answer.tolist())
    is_double = bool(answers) and answers[0].dtype == torch.float64
    return pa.array(values, pa.list_(pa.float64() if is_double else pa.float32()))


def _check_span(number: int, start: int, end: int, length: int) -> None:
    if not 0 <= start < end <= length:
        raise ValueError(
            f"the span ({start}, {end}) of answer {number} is empty or outside its {length} tokens; allowed: "
            f"0 <= start < end <= {length}"
        )
