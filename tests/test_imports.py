"""The direction of the dependencies: who may import what."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_gradmetrics"
FILES = sorted(PACKAGE.rglob("*.py"))

LIGHTNING = {
    "callback.py",
    "hooks.py",
    "command.py",
    "models/classifier.py",
    "models/detector.py",
    "models/digits_cnn.py",
}
"""Only the callback and its hooks, the command, and models that are trained with it use Lightning."""


def imported(path: Path) -> set[str]:
    """The modules that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def uses(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in imported(path))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_direction(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    assert not uses(path, "lightning") or name in LIGHTNING
    assert not (uses(path, "hydra") or uses(path, "omegaconf")) or name == "command.py"
    if name.startswith("engine/"):
        others = {m for m in imported(path) if m.startswith("lightning_gradmetrics.")}
        allowed = ("engine", "forward", "objectives", "statistics")
        assert all(m.split(".")[1] in allowed for m in others), others
    if name.startswith("report/"):
        others = {m for m in imported(path) if m.startswith("lightning_gradmetrics")}
        assert all(m.startswith("lightning_gradmetrics.report") for m in others), others
