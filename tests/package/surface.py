"""Reads the project's files as text: what the surface tests count, and where."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).parents[2]
PACKAGE = PROJECT / "lightning_gradmetrics"


def room_of(path: Path) -> str:
    """Return the room of a file of the package, and the first folder (or the name) of any other file."""
    parts = path.relative_to(PROJECT).parts
    return parts[1] if parts[0] == PACKAGE.name else parts[0]


@cache
def tree_of(path: Path) -> ast.Module:
    """Return the syntax tree of a file, parsed once for all tests."""
    return ast.parse(path.read_text())


def line_of(text: str, offset: int) -> int:
    """Return the line number, from 1, of an offset in a text."""
    return text.count("\n", 0, offset) + 1


def places(pattern: re.Pattern[str], paths: list[Path]) -> dict[str, list[str]]:
    """Return the matches of a pattern in files, by room, as ``path:line: match``."""
    found = defaultdict(list)
    for path in paths:
        text = path.read_text()
        for match in pattern.finditer(text):
            place = f"{path.relative_to(PROJECT)}:{line_of(text, match.start())}: {match.group()!r}"
            found[room_of(path)].append(place)
    return found


def statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Yield the statements of a module that contain no other statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not any(isinstance(child, ast.stmt) for child in ast.iter_child_nodes(node)):
            yield node


def over(counts: Mapping[str, float], allowed: Mapping[str, float], default: float) -> list[str]:
    """Return the rooms whose count exceeds their allowance, in words."""
    rows = []
    for room, count in sorted(counts.items()):
        limit = max(default, allowed.get(room, default))
        if count > limit:
            rows.append(f"{room}: {count:g}, allowed {limit:g}")
    return rows
