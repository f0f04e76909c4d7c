"""The report's wording of numbers, tasks, metrics and roles."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lightning_gradmetrics.evaluation.metrics import METRICS, SHOWN

__all__ = [
    "METRICS",
    "SHOWN",
    "MetricWords",
    "counted",
    "interval",
    "metric_words",
    "number",
    "paper_link",
    "percent",
    "question_title",
    "role_title",
    "short_number",
    "signed",
    "whole",
]

ROLES = {"id": "in-distribution", "near": "near OOD", "far": "far OOD"}
QUESTIONS = {("misclassification", "id"): "Errors", ("ood", "near"): "Near OOD", ("ood", "far"): "Far OOD"}
ARXIV = re.compile(r"arXiv:\s*(\d{4}\.\d{4,5})", re.IGNORECASE)


@dataclass(frozen=True)
class MetricWords:
    """A metric's title, decimals when multiplied by 100, direction (None: unknown) and meaning."""

    title: str
    digits: int = 1
    meaning: str = ""
    higher: bool | None = None

    @property
    def arrow(self) -> str:
        """An arrow in the better direction, or an empty string if it is unknown."""
        return {True: "↑", False: "↓", None: ""}[self.higher]


def metric_words(metric: str) -> MetricWords:
    """Return the wording of a metric; an unknown metric keeps its name."""
    if metric not in METRICS:
        return MetricWords(metric)
    known = METRICS[metric]
    return MetricWords(known.title, known.digits, known.meaning, known.higher_is_better)


def role_title(role: str) -> str:
    """Return a role as the report names it."""
    return ROLES.get(role, role or "–")


def question_title(task: str, group: str) -> str:
    """Return the title of a question, such as 'Far OOD'."""
    if task == "joint":
        return f"Errors and {role_title(group)}"
    return QUESTIONS.get((task, group), group if task == "ood" else task)


def number(value: float | None) -> bool:
    """Return true if the value is a finite number."""
    return value is not None and math.isfinite(value)


def short_number(value: float, digits: int = 4) -> str:
    """Return a number with a few significant digits and a true minus sign.

    Example:
        >>> short_number(-1.23456), short_number(1234567.0), short_number(-0.5, 3)
        ('−1.235', '1.235e+06', '−0.5')
    """
    return f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}")


def percent(value: float | None, digits: int = 1) -> str:
    """Return a number times 100 with a true minus sign; a dash if there is none.

    Example:
        >>> percent(0.91234), percent(None), percent(-0.005, 2), percent(-0.0001)
        ('91.2', '–', '−0.50', '0.0')
    """
    if value is None or not math.isfinite(value):
        return "–"
    rounded = round(100 * value, digits) or 0.0
    return f"{rounded:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def signed(value: float | None, digits: int = 1) -> str:
    """Return a difference times 100 with its sign.

    Example:
        >>> signed(0.012), signed(-0.012), signed(0.0)
        ('+1.2', '−1.2', '0.0')
    """
    text = percent(value, digits)
    positive = value is not None and round(100 * value, digits) > 0
    return f"+{text}" if positive else text


def interval(low: float | None, high: float | None, digits: int = 1) -> str:
    """Return both ends times 100, such as '88.1 to 92.3'; empty if an end is missing."""
    if not (number(low) and number(high)):
        return ""
    return f"{percent(low, digits)} to {percent(high, digits)}"


def whole(value: int | None) -> str:
    """Return a count with thousands separators; a dash if there is none."""
    return "–" if value is None else f"{value:,}"


def counted(value: object, noun: str) -> str:
    """Return a count with its noun; empty if the value is not a whole number.

    Example:
        >>> counted(1, "class"), counted(2000, "class"), counted(None, "class")
        ('1 class', '2,000 classes', '')
    """
    if not isinstance(value, int):
        return ""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{whole(value)} {noun if value == 1 else plural}"


def paper_link(paper: str | None) -> str:
    """Return the address of a paper if its citation contains an arXiv number, otherwise an empty string.

    Example:
        >>> paper_link("Huang et al. 2021, arXiv:2110.00218")
        'https://arxiv.org/abs/2110.00218'
    """
    number = ARXIV.search(paper or "")
    return f"https://arxiv.org/abs/{number[1]}" if number else ""
