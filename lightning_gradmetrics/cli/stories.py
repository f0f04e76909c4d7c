"""The experiment on generated and other text: detects wrong tokens, and texts unlike the model's training text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_gradmetrics.language import ScoredGeneration, score_generation
from lightning_gradmetrics.meters.functional import aurc, auroc
from lightning_gradmetrics.scoring.evidence import Evidence

__all__ = [
    "KINDS",
    "Stories",
    "read_sequences",
    "score_names",
    "sequence_rows",
    "sequence_table",
    "show_stories",
    "token_rows",
    "token_table",
]

KINDS = {"generated": "id", "darwin": "near", "shakespeare": "far"}
"""The kinds of text in ``sequences.npz`` with their roles: the model's training text, similar text, and other text."""

INCORRECT = "incorrect"

NO_SCORES = ("dataset", "index", "text", "prediction", "label")
"""The columns of a table that are not scores."""

AGGREGATES = ("gradient",)
"""Adds scores of the head's gradient of a sequence's mean loss."""


def incorrect(evidence: Evidence) -> Tensor:
    """Return 1 if the predicted token differs from the next token, else 0, ``(N,)``."""
    return evidence.incorrect.double()


@dataclass(frozen=True)
class Stories:
    """A language model and the sequences to score.

    Args:
        model: The model.
        sequences: Token ids ``(N, T)`` by kind; the first token of each is the start of the text.
        batch_size: The number of sequences in one forward pass.
        prefix: The number of predicted tokens per sequence in the comparison of kinds of text.
        prompt: The number of prompt tokens of these sequences, for SemGrad and HybridGrad.
    """

    model: nn.Module
    sequences: Mapping[str, Tensor]
    batch_size: int = 20
    prefix: int = 16
    prompt: int = 5


def read_sequences(root: str | Path, rows: str = "all") -> dict[str, Tensor]:
    """Return the token ids by kind, from ``sequences.npz``.

    Args:
        root: The folder with the file.
        rows: ``all``, ``even`` or ``odd``.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If ``rows`` is any other word.
    """
    steps = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}
    if rows not in steps:
        raise ValueError(f"unknown rows {rows!r}; allowed: {', '.join(steps)}")
    file = Path(root).expanduser() / "sequences.npz"
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: root= is the folder with sequences.npz and the model")
    sequences = {}
    with np.load(file) as arrays:
        for kind in KINDS:
            sequences[kind] = torch.from_numpy(arrays[kind][steps[rows]].astype("int64"))
    return sequences


def _scored(stories: Stories, ids: Tensor, prompt: int, scores: Sequence[object]) -> ScoredGeneration:
    answers, prompts = ids[:, prompt:].tolist(), ids[:, :prompt].tolist()
    options: Any = {"batch_size": stories.batch_size, "aggregates": AGGREGATES}
    return score_generation(stories.model, prompts, answers, scores, **options)  # type: ignore[arg-type]


def token_table(stories: Stories, scores: Sequence[str]) -> pa.Table:
    """Return the scores of every predicted token, one row per token.

    Args:
        stories: Model and text.
        scores: Scores of tokens.

    Returns:
        A results table: ``dataset`` is the kind, ``text`` the number of the sequence, and ``prediction`` equals ``label`` if the
        predicted token is the next one.
    """
    parts = []
    for kind, ids in stories.sequences.items():
        scored = _scored(stories, ids, 1, [*scores, incorrect])
        columns: dict[str, Tensor] = {}
        for name, answers in scored.tokens.items():
            columns[name] = torch.cat(list(answers)).double()
        wrong = columns.pop(INCORRECT).long()
        text = torch.arange(len(ids)).repeat_interleave(len(wrong) // len(ids))
        parts.append(_table_of(kind, {"text": text, "prediction": wrong, "label": torch.zeros_like(wrong), **columns}))
    return pa.concat_tables(parts)


def sequence_table(stories: Stories, scores: Sequence[str], semantic: Sequence[str]) -> pa.Table:
    """Return the scores of every sequence's first tokens, one row per sequence; there are no labels.

    Args:
        stories: Model and text.
        scores: Scores of tokens, whose mean and maximum become columns, and scores of sequences.
        semantic: Scores of hidden states of the prompt.
    """
    length = stories.prefix + 1
    parts = []
    for kind, ids in stories.sequences.items():
        scored = _scored(stories, ids[:, :length], 1, scores)
        columns = _means(scored)
        if semantic:
            columns |= _scored(stories, ids[:, :length], stories.prompt, semantic).values
        none = torch.full((len(ids),), torch.nan)
        parts.append(_table_of(kind, {"prediction": none, "label": none, **columns}))
    return pa.concat_tables(parts)


def _table_of(kind: str, columns: Mapping[str, Tensor]) -> pa.Table:
    """Return a results table of one kind of text."""
    arrays: dict[str, Any] = {}
    for name, values in columns.items():
        arrays[name] = pa.array(values.numpy(), from_pandas=True)  # NaN becomes null
    size = len(next(iter(columns.values())))
    return pa.table({"dataset": [kind] * size, "index": np.arange(size), **arrays})


def _by_kind(table: pa.Table) -> dict[str, tuple[dict[str, Tensor], Tensor]]:
    """Return the scores of each kind of text, and which predictions are wrong."""
    scores_by_kind = {}
    for kind in table["dataset"].unique().to_pylist():
        rows = table.filter(pc.equal(table["dataset"], kind))
        scores = {}
        for name in score_names(table):
            scores[name] = torch.tensor(rows[name].to_numpy())
        scores_by_kind[kind] = scores, torch.tensor(rows["prediction"].to_numpy())
    return scores_by_kind


def score_names(table: pa.Table) -> list[str]:
    """Return the columns of a table that are scores."""
    return [name for name in table.column_names if name not in NO_SCORES]


def token_rows(table: pa.Table) -> list[dict[str, str | float]]:
    """Return the performance of each score at detecting wrong next tokens, one row per score and kind.

    Args:
        table: The result of :func:`token_table`.
    """
    rows: list[dict[str, str | float]] = []
    for kind, (scores, wrong) in _by_kind(table).items():
        for name, values in scores.items():
            row: dict[str, str | float] = {"score": name, "kind": kind, "wrong": float(wrong.double().mean())}
            row |= {"auroc": float(auroc(values, wrong)), "aurc": float(aurc(values, wrong))}
            rows.append(row)
    return rows


def sequence_rows(table: pa.Table) -> list[dict[str, str | float]]:
    """Return the performance of each score at separating other text from generated text, one row per score and kind.

    Args:
        table: The result of :func:`sequence_table`.
    """
    scores_by_kind = _by_kind(table)
    inside, *others = scores_by_kind
    rows: list[dict[str, str | float]] = []
    for name, values in scores_by_kind[inside][0].items():
        for kind in others:
            both = torch.cat([values, scores_by_kind[kind][0][name]]).double()
            is_other = torch.cat([torch.zeros(len(values)), torch.ones(len(both) - len(values))]).long()
            rows.append({"score": name, "kind": kind, "auroc": float(auroc(both, is_other))})
    return rows


def _means(scored: ScoredGeneration) -> dict[str, Tensor]:
    """Return the mean and the maximum over the tokens of each sequence, and the scores of sequences."""
    columns = {}
    for name, answers in scored.tokens.items():
        columns[f"mean {name}"] = torch.stack([answer.double().mean() for answer in answers])
        columns[f"max {name}"] = torch.stack([answer.double().amax() for answer in answers])
    return columns | dict(scored.values)


def show_stories(tokens: Sequence[Mapping[str, str | float]], sequences: Sequence[Mapping[str, str | float]]) -> None:
    """Print both tables: one row per score, one column per kind of text.

    Args:
        tokens: The result of :func:`token_rows`.
        sequences: The result of :func:`sequence_rows`.
    """
    console = Console()
    shares = {}
    for row in tokens:
        shares[str(row["kind"])] = 100 * float(row["wrong"])
    titles = []
    for kind, share in shares.items():
        titles.append(f"{kind} ({share:.2f} % wrong)")
    console.print(_table("Wrong next tokens: AUROC / AURC x 100", titles, list(shares), tokens))
    kinds = list(dict.fromkeys(str(row["kind"]) for row in sequences))
    console.print(_table("Text of another kind than generated: AUROC x 100", kinds, kinds, sequences))


def _table(
    title: str, headings: Sequence[str], kinds: Sequence[str], rows: Sequence[Mapping[str, str | float]]
) -> Table:
    table = Table(title=title)
    table.add_column("score", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        text = f"{100 * float(row['auroc']):.3f}"
        if "aurc" in row:
            text += f" / {100 * float(row['aurc']):.3f}"
        cells.setdefault(str(row["score"]), {})[str(row["kind"])] = text
    for score, by_kind in cells.items():
        table.add_row(score, *[by_kind[kind] for kind in kinds])
    return table
