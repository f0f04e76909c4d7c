"""What the surface tests still allow, by room. Every table shrinks to nothing: never raise a number."""

from __future__ import annotations

HABITS: dict[str, int] = {
    "README.md": 5,
    "benchmarks": 5,
    "callback": 9,
    "cli": 17,
    "compat": 2,
    "conf": 1,
    "docs": 26,
    "engine": 5,
    "evaluation": 15,
    "gradients": 1,
    "pictures": 4,
    "report": 15,
    "scores": 4,
    "scoring": 9,
}
"""Habits of translated English left in a room."""

NESTED_STATEMENTS: dict[str, int] = {
    "classifier": 1,
    "cli": 19,
    "compat": 4,
    "engine": 21,
    "evaluation": 6,
    "gradients": 3,
    "pictures": 6,
    "report": 32,
    "results": 2,
    "scores": 2,
    "scoring": 13,
}
"""Statements with nested comprehensions, lambdas or ternaries left in a room."""

COMPREHENSIONS_PER_1000_LINES: dict[str, float] = {
    "callback": 30.0,
    "classifier": 50.3,
    "cli": 58.1,
    "compat": 52.2,
    "engine": 51.6,
    "evaluation": 46.2,
    "gradients": 26.1,
    "pictures": 51.0,
    "report": 65.2,
    "results": 64.9,
    "scores": 15.2,
    "scoring": 30.8,
}
"""Of rooms above the limit."""

UNDOCUMENTED: dict[str, set[str]] = {
    "lgm.evaluation": {"Evaluation", "Thresholds", "apply_thresholds", "fit_thresholds"},
}
"""Public names whose docstring is not complete yet, by namespace."""
