"""Renders text as HTML with each token coloured by the rank of its score."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["tokens_html"]

LIGHT, DARK = (255, 255, 255), (213, 94, 0)
"""Colours of the least and the most uncertain token: white, and Okabe and Ito's vermilion."""


def tokens_html(texts: Sequence[str], values: Any, notes: Sequence[str] = ()) -> str:
    """Return a text as HTML, its tokens coloured by the rank of their score: white for the lowest, vermilion for the highest.

    Every colour covers the same number of tokens. On a linear scale, only the few largest values would stand out.

    Args:
        texts: The text of each token, as ``tokenizer.decode([id])`` returns it; a line feed starts a new line.
        values: The score of each token ``(T,)``: a tensor, an array or a list.
        notes: Text to show with the score when the pointer is over a token, such as the runner-up.

    Returns:
        One ``<p>`` element with a ``<span>`` for each token; it can be part of any page or notebook.

    Raises:
        ValueError: If the number of values or notes differs from that of tokens, or a value is not finite.

    Example:
        >>> page = tokens_html(["Lily ", "ate", "."], [0.2, 3.1, 0.5], ["", "runner-up: saw", ""])
        >>> page.count("<span"), 'title="3.1, runner-up: saw"' in page
        (3, True)
    """
    numbers = np.asarray(values, np.float64)
    if numbers.shape != (len(texts),) or (notes and len(notes) != len(texts)) or not np.isfinite(numbers).all():
        raise ValueError(
            f"there are {len(texts)} tokens, values of shape {numbers.shape} and {len(notes)} notes; expected one finite value "
            "per token, and one note per token or none"
        )
    spans = []
    for number, (text, rank) in enumerate(zip(texts, _ranks(numbers), strict=True)):
        words = [f"{numbers[number]:.4g}", *notes[number : number + 1]]
        title = html.escape(", ".join(filter(None, words)))
        shown = html.escape(text).replace("\n", "<br>")
        spans.append(f'<span title="{title}" style="background:{_colour(float(rank))}">{shown}</span>')
    return f'<p style="line-height:1.6;white-space:pre-wrap;color:#000">{"".join(spans)}</p>'


def _ranks(values: Any) -> Any:
    """Return the fraction of the other tokens with a lower value, ``(T,)`` in [0, 1]."""
    return np.searchsorted(np.sort(values), values) / max(1, len(values) - 1)


def _colour(rank: float) -> str:
    """Return the colour of a rank in [0, 1]."""
    channels = []
    for low, high in zip(LIGHT, DARK, strict=True):
        channels.append(round(low + rank * (high - low)))
    return f"rgb({channels[0]},{channels[1]},{channels[2]})"
