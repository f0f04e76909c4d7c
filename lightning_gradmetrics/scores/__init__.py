"""Scores: named methods from evidence to an uncertainty, higher = more uncertain.

Every module of this package is imported, and every score that it registers becomes a name of this package. The stub
``__init__.pyi`` lists the same names for type checkers; ``python -m lightning_gradmetrics.cli.score_catalogue`` writes it.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys

from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.fitted import FittedScore
from lightning_gradmetrics.scoring.registry import OF_ANSWERS, RECIPES, Score, register
from lightning_gradmetrics.scoring.states import load_fitted, save_fitted

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

NAMES = tuple(sorted(name for name, recipe in RECIPES.items() if recipe.method.__module__.startswith(__name__)))
"""The names of the scores of this package."""

for _name in NAMES:
    globals()[_name] = getattr(sys.modules[RECIPES[_name].method.__module__], _name)

__all__ = [
    "Evidence",
    "FittedScore",
    "Score",
    "load_fitted",
    "register",
    "save_fitted",
    *NAMES,
]


def __getattr__(name: str) -> object:
    """Raise an error that names the function to call instead."""
    if name in OF_ANSWERS:
        raise AttributeError(
            f"{name!r} is a score of whole texts, known by its name only: call lightning_gradmetrics.score_generation(model, "
            f"prompts, answers, {name!r}), or pass the name to GradientMetrics"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
