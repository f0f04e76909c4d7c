"""The leaderboard page is what its files render to."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_gradmetrics.cli.leaderboard import page

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_rendered_from_its_files() -> None:
    runs = [json.loads(path.read_text()) for path in sorted((DOCS / "leaderboard").glob("*.json"))]
    assert runs and page(runs) == (DOCS / "leaderboard.md").read_text()
    for run in runs:
        for row in run["rows"]:
            assert all(low <= area <= high for area, low, high in (row["errors"], row["joint near"], row["joint far"]))
