"""Texts of a run over language-model batches, with every token coloured by the rank of its score."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from markupsafe import Markup, escape

from lightning_gradmetrics.evaluation.reading import finite_rows
from lightning_gradmetrics.language.coloured_text import tokens_html
from lightning_gradmetrics.report.run import RESULTS_FILE, Run
from lightning_gradmetrics.results.replacing import write_text
from lightning_gradmetrics.results.tokens import LIST_PREFIX

__all__ = ["TEXTS_FILE", "TOKENS_FILE", "Text", "coloured_texts", "texts_page", "write_tokens"]

TOKENS_FILE = "tokens.json"
"""The text of each token id in the results, relative to the run directory."""

TEXTS_FILE = "texts.html"
"""The coloured texts as a page, relative to the run directory."""

LISTS = ("token_ids", "predicted_ids")
"""The columns of token ids."""

MOST_UNCERTAIN, LEAST_UNCERTAIN = 2, 1
"""The numbers of texts shown for each dataset and score."""

SHOWN_SCORES = 3
"""The number of scores for which texts are shown."""

LONGEST = 1000
"""The largest number of tokens shown of a text."""


@dataclass(frozen=True)
class Text:
    """A coloured text with its heading."""

    title: str
    content: Markup


def write_tokens(directory: Path, results: pa.Table, decode: Callable[[list[int]], str]) -> Path:
    """Write the text of each token id in the results to ``tokens.json``.

    Args:
        directory: The run directory.
        results: Results of texts.
        decode: From token ids to their text, such as ``tokenizer.decode``.

    Returns:
        The path of the file.
    """
    used: set[int] = set()
    for name in LISTS:
        used.update(pc.unique(pc.list_flatten(results[name])).to_pylist())
    words = {}
    for token in sorted(used):
        words[str(token)] = decode([token])
    return write_text(directory / TOKENS_FILE, json.dumps(words, ensure_ascii=False) + "\n")


def coloured_texts(run: Run, names: Sequence[str]) -> dict[str, list[Text]]:
    """Return the most and the least uncertain texts of each dataset by score; empty for a run that is not over texts.

    Args:
        run: The run.
        names: The scores; those without values of tokens are left out, and at most three are shown.
    """
    results = run.directory / RESULTS_FILE
    columns = pq.read_schema(results).names
    shown = [name for name in names if f"{LIST_PREFIX}{name}" in columns][:SHOWN_SCORES]
    if not shown:
        return {}
    file = run.directory / TOKENS_FILE
    words = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    lists = pq.read_table(results, columns=[*LISTS, *(f"{LIST_PREFIX}{name}" for name in shown)])
    texts: dict[str, list[Text]] = {}
    for name in shown:
        texts[name] = []
        for title, row in _chosen(run.results, name):
            texts[name].append(Text(title, Markup(_coloured(lists.slice(row, 1), name, words))))
    return texts


def _chosen(results: pa.Table, score: str) -> Iterator[tuple[str, int]]:
    """Yield a heading and the row of each text that is shown."""
    values = np.asarray(results[score].to_numpy(zero_copy_only=False), np.float64)
    datasets, finite = np.asarray(results["dataset"].to_pylist()), finite_rows(results, [score])
    for dataset in pc.unique(results["dataset"]).to_pylist():
        rows = np.flatnonzero((datasets == dataset) & finite)
        order = rows[np.argsort(-values[rows], kind="stable")]
        most, rest = order[:MOST_UNCERTAIN], order[MOST_UNCERTAIN:]
        for kind, chosen in (("most uncertain", most), ("least uncertain", rest[-LEAST_UNCERTAIN:])):
            for row in chosen.tolist():
                index = results["index"][row].as_py()
                yield f"{dataset}, text {index}, {kind}: mean {values[row]:.3g}", row


def _coloured(row: pa.Table, score: str, words: dict[str, str]) -> str:
    """Return one text as HTML; hovering over a token shows its value, and the predicted token if it differs."""
    tokens, predicted = row["token_ids"][0].as_py()[:LONGEST], row["predicted_ids"][0].as_py()[:LONGEST]
    values = row[f"{LIST_PREFIX}{score}"][0].as_py()[:LONGEST]
    texts, notes = [], []
    for token, guess in zip(tokens, predicted, strict=True):
        texts.append(words.get(str(token), f" {token}"))
        notes.append("" if token == guess else f"predicted: {words.get(str(guess), guess)}")
    return tokens_html(texts, values, notes)


def texts_page(texts: dict[str, list[Text]]) -> str:
    """Return coloured texts as one HTML page.

    Args:
        texts: From :func:`coloured_texts`.
    """
    parts = ["<!doctype html><meta charset='utf-8'><title>Texts by the rank of their tokens' scores</title>"]
    for name, of_score in texts.items():
        parts.append(f"<h2>{escape(name)}</h2>")
        for text in of_score:
            parts.append(f"<h3>{escape(text.title)}</h3>{text.content}")
    return "\n".join(parts) + "\n"
