"""Keeps modules short and statements simple: no nested comprehensions, lambdas or ternaries, and few comprehensions."""

from __future__ import annotations

import ast
from collections import defaultdict

from tests.package.allowances import COMPREHENSIONS_PER_1000_LINES, NESTED_STATEMENTS
from tests.package.surface import PACKAGE, PROJECT, over, room_of, statements, tree_of

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
CONSTRUCTS = (*COMPREHENSIONS, ast.Lambda, ast.IfExp)
PER_1000_LINES = 15
"""Comprehensions that a room may have for each 1,000 lines."""

MOST_LINES = 400
"""Every module has fewer lines."""


def is_nested(statement: ast.stmt) -> bool:
    """Return whether a comprehension, lambda or ternary of the statement contains another."""
    for outer in ast.walk(statement):
        if isinstance(outer, CONSTRUCTS):
            inside = [node for node in ast.walk(outer) if isinstance(node, CONSTRUCTS)]
            if len(inside) > 1:
                return True
    return False


def test_no_statement_nests_comprehensions() -> None:
    nested = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for statement in statements(tree_of(path)):
            if is_nested(statement):
                nested[room_of(path)].append(f"{path.relative_to(PROJECT)}:{statement.lineno}")
    counts = {room: float(len(rows)) for room, rows in nested.items()}
    bad = over(counts, NESTED_STATEMENTS, 0)
    rows = [row for room in bad for row in nested[room.partition(":")[0]]]
    assert not bad, "\n".join([*bad, *rows])


def test_comprehensions_are_few() -> None:
    comprehensions: defaultdict[str, int] = defaultdict(int)
    lines: defaultdict[str, int] = defaultdict(int)
    for path in sorted(PACKAGE.rglob("*.py")):
        lines[room_of(path)] += path.read_text().count("\n")
        comprehensions[room_of(path)] += sum(isinstance(node, COMPREHENSIONS) for node in ast.walk(tree_of(path)))
    rates = {room: round(1000 * comprehensions[room] / lines[room], 1) for room in lines if lines[room] > 100}
    assert not over(rates, COMPREHENSIONS_PER_1000_LINES, PER_1000_LINES), "comprehensions per 1,000 lines of a room"


def test_modules_are_short() -> None:
    long = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        lines = path.read_text().count("\n")
        if lines >= MOST_LINES:
            long[str(path.relative_to(PROJECT))] = lines
    assert not long
