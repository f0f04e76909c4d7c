"""Notes on missing parts of a report, and the details of a run without absolute paths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightning_gradmetrics.report.panels import MAX_ROWS, drawn_rows
from lightning_gradmetrics.report.run import METRICS_FILE, RESULTS_FILE, Run
from lightning_gradmetrics.report.wording import counted, short_number

__all__ = ["configuration", "details", "notes", "shortened"]

ABSOLUTE = re.compile(r"(?<![\w/])(?:/[^\s/'\",:=(){}\[\]]+){3,}")


def shortened(text: str) -> str:
    """Return the text with absolute paths shortened to their last two parts.

    Example:
        >>> shortened("data.id={mine:/home/ada/photos/test} url=https://a.org/b/c/d")
        'data.id={mine:…/photos/test} url=https://a.org/b/c/d'
    """
    return ABSOLUTE.sub(_last_two_parts, text)


def _last_two_parts(path: re.Match[str]) -> str:
    return "…/" + "/".join(path[0].split("/")[-2:])


def notes(run: Run) -> list[str]:
    """Return the notes of the run, and a note for each part that is missing or reduced."""
    told = " ".join(run.notes)
    lines = list(run.notes)
    for word, text in _gaps(run):
        if word not in told:
            lines.append(text)
    return list(dict.fromkeys(lines))


def _gaps(run: Run) -> list[tuple[str, str]]:
    """Return notes on gaps in the tables, each with a keyword; a note of the run that contains it is about the same gap."""
    gaps = []
    not_finite = []
    labelled, groups = set(), set()
    for dataset in run.datasets:
        groups.add(dataset.role)
        if dataset.labelled:
            labelled.add(dataset.role)
        if dataset.not_finite:
            not_finite.append(f"{dataset.name}: {dataset.not_finite} of {dataset.rows}")
    if not_finite:
        gaps.append(("finite", f"Rows with NaN or Inf are excluded from metrics and plots ({'; '.join(not_finite)})."))
    if "id" not in labelled:
        gaps.append(("label", "No in-distribution dataset has labels, so misclassification cannot be evaluated."))
    if not groups - {"", "id"}:
        gaps.append(("out-of-distribution", "The run has no out-of-distribution dataset."))
    rate = run.settings.get("rate", 0.95)
    if rate != 0.95:
        gaps.append(("FPR95", f"FPR95 is computed at a true-positive rate of {100 * rate:g} %."))
    finite = run.finite_rows()
    if not finite:
        gaps.append(("No row is finite", "No row is finite, so there are no plots."))
    if sum(map(len, finite.values())) > sum(map(len, drawn_rows(run).values())):
        gaps.append(
            (
                "Plots show",
                f"Plots show at most {counted(MAX_ROWS, 'row')}, drawn with a fixed seed; tables use all rows.",
            )
        )
    others = sorted(set(run.rows) - set(run.roles))
    if others:
        gaps.append((others[0], f"{RESULTS_FILE} has rows of {', '.join(others)}, which {METRICS_FILE} does not list."))
    if run.label_readers:
        gaps.append(("true label", f"{', '.join(run.label_readers)} read the true label: not evaluated as detectors."))
    if any("labels" in score.fit or "OOD" in score.fit for score in run.scores):
        gaps.append(
            ("fitted on", "Scores marked 'fitted on ...' saw held-out labels or OOD samples; other scores did not.")
        )
    if run.comparisons:
        gaps.append(("corrected", "Intervals are not corrected for the number of comparisons."))
    return gaps


def details(run: Run) -> dict[str, dict[str, str]]:
    """Return the facts of a run by subject, without absolute paths."""
    evaluation = {}
    for key in ("seed", "level", "resamples", "rate"):
        evaluation[key] = run.settings.get(key)
    subjects = {
        "Model": {**run.model, "class_names": None},
        "Evaluation": evaluation,
        "Environment": run.environment,
        "Time": run.timing,
        "Files": {"per-sample results": RESULTS_FILE, "metrics": METRICS_FILE, "run": run.directory.resolve().name},
    }
    shown: dict[str, dict[str, str]] = {}
    for subject, facts in subjects.items():
        for key, value in facts.items():
            if value is not None:
                shown.setdefault(subject, {})[key.replace("_", " ")] = shortened(_plain(value))
    return shown


def configuration(run: Run) -> str:
    """Return the configuration of a run of the command, or an empty string."""
    path = run.directory / ".hydra" / "config.yaml"
    return shortened(path.read_text(encoding="utf-8")) if path.is_file() else ""


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return short_number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return str(value)
