"""Notes on what a report lacks, and the details of a run without absolute paths."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from lightning_gradmetrics.report.panels import MAX_ROWS, drawn_rows
from lightning_gradmetrics.report.questions import is_detector
from lightning_gradmetrics.report.run import IMAGE_TYPES, METRICS_FILE, RESULTS_FILE, Picture, Run
from lightning_gradmetrics.report.wording import counted

__all__ = ["configuration", "details", "notes", "picture_source", "shortened"]

ABSOLUTE = re.compile(r"(?<![\w/])(?:/[^\s/'\",:=(){}\[\]]+){3,}")


def shortened(text: str) -> str:
    """Return a text in which absolute paths are cut to their last two parts.

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
    added = [text for word, text in _gaps(run) if word not in told]
    return list(dict.fromkeys([*run.notes, *added]))


def _gaps(run: Run) -> list[tuple[str, str]]:
    """Return what the tables lack, each with a word that a note of the run on the same subject contains."""
    found = []
    not_finite = [f"{each.name}: {each.not_finite} of {each.rows}" for each in run.datasets if each.not_finite]
    if not_finite:
        found.append(("finite", f"Rows with NaN or Inf are excluded from metrics and plots ({'; '.join(not_finite)})."))
    if not any(each.role == "id" and each.labelled for each in run.datasets):
        found.append(("label", "No in-distribution dataset has labels, so misclassification cannot be evaluated."))
    if not any(each.role not in ("", "id") for each in run.datasets):
        found.append(("out-of-distribution", "The run has no out-of-distribution dataset."))
    rate = run.settings.get("rate", 0.95)
    if rate != 0.95:
        found.append(("FPR95", f"FPR95 is taken at a true-positive rate of {100 * rate:g} %."))
    finite = run.finite_rows()
    if not finite:
        found.append(("No row is finite", "No row is finite, so there are no plots."))
    rows = sum(len(part) for part in finite.values())
    if rows > sum(len(part) for part in drawn_rows(run).values()):
        found.append(
            (
                "Plots show",
                f"Plots show at most {counted(MAX_ROWS, 'row')}, drawn with a fixed seed; tables use all rows.",
            )
        )
    others = sorted(set(run.rows) - {each.name for each in run.datasets})
    if others:
        found.append(
            (others[0], f"{RESULTS_FILE} has rows of {', '.join(others)}, which {METRICS_FILE} does not list.")
        )
    readers = [score.name for score in run.scores if not is_detector(run, score.name)]
    if readers:
        found.append(("true label", f"{', '.join(readers)} read the true label: not evaluated as detectors."))
    if any("labels" in score.fit or "OOD" in score.fit for score in run.scores):
        found.append(
            ("fitted on", "Scores marked 'fitted on ...' saw held-out labels or OOD samples; other scores did not.")
        )
    if run.comparisons:
        found.append(("corrected", "Intervals are not corrected for the number of comparisons."))
    return found


def details(run: Run) -> dict[str, dict[str, str]]:
    """Return the facts of a run by subject, without absolute paths."""
    wanted = ("seed", "level", "resamples", "rate")
    subjects = {
        "Model": run.model,
        "Evaluation": {key: run.settings[key] for key in wanted if key in run.settings},
        "Environment": run.environment,
        "Time": run.timing,
        "Files": {"per-sample results": RESULTS_FILE, "metrics": METRICS_FILE, "run": run.directory.resolve().name},
    }
    shown = {}
    for subject, facts in subjects.items():
        known = {key.replace("_", " "): shortened(_plain(value)) for key, value in facts.items() if value is not None}
        if known:
            shown[subject] = known
    return shown


def configuration(run: Run) -> str:
    """Return the configuration of a run of the command, or an empty string."""
    path = run.directory / ".hydra" / "config.yaml"
    return shortened(path.read_text(encoding="utf-8")) if path.is_file() else ""


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return str(value)


def picture_source(run: Run, picture: Picture) -> Markup:
    """Return a picture of the run as a data URL."""
    path = run.directory / picture.file
    return Markup(f"data:{IMAGE_TYPES[path.suffix]};base64,{b64encode(path.read_bytes()).decode()}")
