"""The public names: which there are, how many, and that each one is documented."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lightning_gradmetrics as lgm
from lightning_gradmetrics.compat import gradient_metrics
from tests.package.allowances import UNDOCUMENTED

ROOT = Path(__file__).parents[2]

FACE = {
    "GradientMetrics",
    "GradientStatistics",
    "Pixels",
    "cosine_similarity_maps",
    "cross_fit",
    "evaluation",
    "export",
    "fit",
    "gradient_features",
    "gradient_profile",
    "gradient_statistics",
    "meters",
    "plot",
    "ray",
    "read_results",
    "score",
    "score_generation",
    "scores",
    "unfinished",
    "watching_generation",
}
"""The names of ``lightning_gradmetrics``. A change here is a change for every user."""

NOT_YET: set[str] = set()

NAMESPACES: dict[str, ModuleType] = {
    "lgm": lgm,
    "lgm.scores": lgm.scores,
    "lgm.meters": lgm.meters,
    "lgm.meters.functional": lgm.meters.functional,
    "lgm.evaluation": lgm.evaluation,
    "lgm.export": lgm.export,
    "lgm.plot": lgm.plot,
    "lgm.ray": lgm.ray,
    "compat.gradient_metrics": gradient_metrics,
    "compat.gradient_metrics.metrics": gradient_metrics.metrics,
}

DEEP_NAMES = {
    "lightning_gradmetrics.engine.kernels.describe_kernels",
    "lightning_gradmetrics.engine.rules.rule",
    "lightning_gradmetrics.engine.uses.RowsUse",
    "lightning_gradmetrics.meters.base.ScoreMeter",
}
"""Names outside the namespaces that a page of the documentation imports; they are public too."""

MOST_NAMES = 131
"""Public names of all namespaces and the deep names together; 114 if a meter and its function count once."""


def missing_parts(item: Any) -> list[str]:
    """Return which of Args, Returns and Example the docstring of a public object lacks."""
    docstring = inspect.getdoc(item) or ""
    is_class = inspect.isclass(item)
    if not is_class and docstring == inspect.getdoc(type(item)):
        return ["a docstring"]
    takes_arguments = bool(inspect.signature(item).parameters)
    wanted = {"Args:": takes_arguments, "Returns:": not is_class, "Example:": True}
    return [part for part, is_wanted in wanted.items() if is_wanted and part not in docstring]


def test_the_public_names_are_the_documented_ones() -> None:
    names = set(lgm.__all__)
    assert names <= FACE, f"{names - FACE}: not part of the public face"
    assert FACE - names <= NOT_YET
    assert all(hasattr(lgm, name) for name in names)


def test_the_public_names_fit_on_a_page() -> None:
    names = {f"{prefix}.{name}" for prefix, module in NAMESPACES.items() for name in module.__all__}
    assert len(names | DEEP_NAMES) <= MOST_NAMES, len(names | DEEP_NAMES)


def test_the_documentation_imports_public_names() -> None:
    """Examples and pages import from a namespace, or one of the names that are listed above."""
    modules = {module.__name__: module for module in NAMESPACES.values()}
    paths = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")]
    imported = set()
    for path in paths:
        for module, names in re.findall(r"from (lightning_gradmetrics[\w.]*) import ([\w, ]+)", path.read_text()):
            imported |= {(module, name.strip()) for name in names.split(",")}
    private = set()
    for module, name in imported:
        if module not in modules or name not in modules[module].__all__:
            private.add(f"{module}.{name}")
    assert private == DEEP_NAMES


@pytest.mark.parametrize("prefix", NAMESPACES)
def test_every_public_object_is_documented(prefix: str) -> None:
    incomplete = {}
    for name in NAMESPACES[prefix].__all__:
        item = getattr(NAMESPACES[prefix], name)
        if callable(item):
            incomplete[name] = missing_parts(item)
    bad = {name: parts for name, parts in incomplete.items() if parts}
    new = bad.keys() - UNDOCUMENTED.get(prefix, set())
    assert not new, "\n".join(f"{prefix}.{name} lacks {', '.join(bad[name])}" for name in sorted(new))
