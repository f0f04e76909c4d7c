"""A report with every part, which the tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.report.page_tree import Node
from tests.report.report_pages import FOUR, page


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Node]:
    directory = tmp_path_factory.mktemp("full")
    return directory, page(directory, intervals=True, comparisons=True, not_finite=3, **FOUR)


@pytest.fixture(scope="session")
def content(full: tuple[Path, Node]) -> Any:
    return json.loads((full[0] / "metrics.json").read_text())
