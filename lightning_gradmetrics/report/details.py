"""Run details, folded: every figure, the scores in words, the command, the model, the environment, timing and files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_gradmetrics.report.markup import Markup, breakable, join, prose, tag
from lightning_gradmetrics.report.run import METRICS_FILE, RESULTS_FILE, Run, Score
from lightning_gradmetrics.report.tables import all_figures

__all__ = ["details"]


def details(run: Run) -> Markup:
    """Folded blocks; those that are short are opened for print."""
    files = {"directory": run.directory.resolve().name, "per-sample results": RESULTS_FILE, "figures": METRICS_FILE}
    words = {score.name: _in_words(score) for score in run.scores}
    return join(
        _fold("All figures", all_figures(run), printed=False) if run.metrics else None,
        _fold("Scores in words", _pairs(words, names=True), printed=False) if any(words.values()) else None,
        _fold("Command", tag("pre", run.command)) if run.command else None,
        _fold("Model", _pairs(run.model)) if run.model else None,
        _fold("Environment", _pairs(run.environment)) if run.environment else None,
        _fold("Timing", _pairs(run.timing)) if run.timing else None,
        _fold("Files", _pairs(files)),
    )


def _in_words(score: Score) -> str:
    target = score.target and f"computed on: {score.target}"
    return " · ".join(part for part in (score.summary, score.paper, target) if part)


def _fold(title: str, content: Markup, printed: bool = True) -> Markup:
    return tag("details", tag("summary", title), content, class_="print" if printed else None)


def _pairs(values: Mapping[str, Any], names: bool = False) -> Markup:
    """A list of terms; underscores become spaces unless the terms are names."""
    terms = {key if names else key.replace("_", " "): value for key, value in values.items()}
    return tag("dl", [[tag("dt", breakable(term)), tag("dd", prose(_plain(value)))] for term, value in terms.items()])


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)
