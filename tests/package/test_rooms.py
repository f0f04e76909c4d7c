"""Which room may import which, and which rooms may import Lightning and Hydra."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.package.surface import tree_of

PACKAGE = Path(__file__).parents[2] / "lightning_gradmetrics"

ROOMS = {
    # room:      the rooms it may import; each of them is above it in the table
    "classifier": set(),
    "gradients": {"classifier"},
    "results": {"classifier"},
    "engine": {"classifier", "gradients"},
    "meters": {"engine"},
    "evaluation": {"classifier", "meters", "results", "engine"},
    "scoring": {"classifier", "gradients", "results", "evaluation", "engine"},
    "scores": {"classifier", "gradients", "engine", "scoring"},
    "language": {"classifier", "gradients", "engine", "scoring"},
    "export": {"classifier", "scoring", "scores"},
    "compat": {"classifier", "gradients", "engine"},
    "ray": {"classifier", "scoring", "scores"},
    "pictures": {"classifier", "meters", "gradients", "results", "evaluation", "scoring", "scores"},
    "report": {"meters", "results", "evaluation", "scores", "language"},
    "callback": {"classifier", "results", "evaluation", "scoring", "scores", "language", "pictures", "report"},
    "cli": {
        *("classifier", "meters", "results", "evaluation", "scoring", "scores", "language"),
        *("pictures", "report", "callback"),
    },
}
"""From the ground up. A new folder needs a row here."""

ENGINE = ["kernels", "tracing", "rules", "inputs", "passes", "checks", "planning", "compilation"]
"""The folders of the engine; each imports only from those before it."""

MAY_IMPORT = {
    "lightning": {"callback", "cli"},
    "hydra": {"cli"},
    "omegaconf": {"cli"},
}
"""Third-party packages that only some rooms may import."""

FILES = sorted(PACKAGE.rglob("*.py"))


@cache
def imported(path: Path) -> set[str]:
    """The modules that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def rooms_imported_by(path: Path) -> set[str]:
    inside = {name.split(".")[1] for name in imported(path) if name.startswith("lightning_gradmetrics.")}
    return (inside & ROOMS.keys()) - {room_of(path)}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_the_table_has_every_folder_and_no_other() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - {"conf"} == ROOMS.keys()
    assert len(ROOMS) <= 16


def test_only_folders_are_in_the_root() -> None:
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files == {"__init__.py", "py.typed"}


def test_every_room_imports_only_rooms_above_it() -> None:
    above: set[str] = set()
    for room, allowed in ROOMS.items():
        assert allowed <= above, f"{room} may import {allowed - above}, which are below it"
        above.add(room)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_its_row_allows_and_all_of_it(room: str) -> None:
    used: set[str] = set()
    for path in (PACKAGE / room).rglob("*.py"):
        used |= rooms_imported_by(path)
    assert used == ROOMS[room]


def test_every_folder_of_the_engine_imports_only_folders_before_it() -> None:
    engine = PACKAGE / "engine"
    assert {path.name for path in engine.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(ENGINE)
    for place, folder in enumerate(ENGINE):
        for path in (engine / folder).rglob("*.py"):
            used = {name.split(".")[2] for name in imported(path) if name.startswith("lightning_gradmetrics.engine.")}
            assert used.isdisjoint(ENGINE[place + 1 :]), path


def test_no_module_imports_itself_through_others() -> None:
    names = {module_of(path) for path in FILES}
    graph = {
        module_of(path): (imported(path) & names) - {module_of(path)} for path in FILES if path.name != "__init__.py"
    }
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_is_imported_by_its_rooms_alone(package: str) -> None:
    for path in FILES:
        uses = any(name.split(".")[0] == package for name in imported(path))
        assert not uses or room_of(path) in MAY_IMPORT[package], path


def test_tests_mirror_the_rooms() -> None:
    tests = PACKAGE.parent / "tests"
    assert {path.name for path in tests.glob("*.py")} == {"conftest.py", "models.py"}
    folders = {path.name for path in tests.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - {"package"} == ROOMS.keys()
