"""The leaderboard page is what its files render to."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lightning_gradmetrics.cli.leaderboard import page

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_rendered_from_its_files() -> None:
    runs = [json.loads(path.read_text()) for path in sorted((DOCS / "leaderboard").glob("*.json"))]
    assert runs and page(runs) == (DOCS / "leaderboard.md").read_text()
    for run in runs:
        for row in run["rows"]:
            assert all(low <= area <= high for area, low, high in (row["errors"], row["joint near"], row["joint far"]))


def test_the_result_of_the_readme_is_that_of_the_leaderboard() -> None:
    run = json.loads((DOCS / "leaderboard" / "cifar10_resnet20.json").read_text())
    measured = {row["score"]: row for row in run["rows"]}
    rows = re.findall(r"^\| `(\w+)`.*?\| (.*) \|$", (DOCS.parent / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 7
    for name, cells in rows:
        shown = [float(cell.strip(" *")) for cell in cells.split("|")]
        assert shown == [round(100 * measured[name][column][0], 1) for column in ("errors", "near", "far")], name
