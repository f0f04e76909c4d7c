"""The leaderboard page equals the rendered files, and its sentences follow from the intervals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lightning_gradmetrics.cli.leaderboard import COLUMNS, conclusions, page, section
from lightning_gradmetrics.cli.leaderboard_record import column_of, differences_of

DOCS = Path(__file__).parents[2] / "docs"


def row(name: str, area: float, forwards: int = 1) -> dict[str, object]:
    spelled = {"trust_views": "trust(views=10)"}.get(name, name)
    areas = {column: [area, area - 0.01, area + 0.01] for column in COLUMNS}
    return {"score": name, "spelled": spelled, "family": "baseline", "fit": "", "forwards": forwards, **areas}


def run(differences: dict[str, list[float]]) -> dict[str, object]:
    """A run of trust against two baselines of one pass and one of ten."""
    rows = [row("trust", 0.9), row("energy", 0.8), row("gen", 0.85), row("views(score=gen)", 0.95, 10)]
    comparisons = []
    for against, difference in differences.items():
        for column in COLUMNS:
            entry = {"challenger": "trust", "against": against, "column": column, "difference": difference}
            comparisons.append(entry)
    return {"title": "A run", "datasets": [], "fitted_on": {}, "rows": rows, "comparisons": comparisons}


def test_the_page_is_rendered_from_its_files() -> None:
    runs = [json.loads(path.read_text()) for path in sorted((DOCS / "leaderboard").glob("*.json"))]
    assert runs and page(runs) == (DOCS / "leaderboard.md").read_text()
    for content in runs:
        for line in content["rows"]:
            areas = (line[column] for column in COLUMNS if column in line)
            assert all(low <= area <= high for area, low, high in areas)


def test_the_result_of_the_readme_is_that_of_the_leaderboard() -> None:
    run = json.loads((DOCS / "leaderboard" / "cifar10_resnet20.json").read_text())
    measured = {row["score"]: row for row in run["rows"]}
    rows = re.findall(r"^\| `(\w+)`.*?\| (.*) \|$", (DOCS.parent / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 7
    for name, cells in rows:
        shown = [float(cell.strip(" *")) for cell in cells.split("|")]
        assert shown == [round(100 * measured[name][column][0], 1) for column in ("errors", "near", "far")], name


@pytest.mark.parametrize(
    ("to_energy", "to_gen", "sentence"),
    [
        ([0.1, 0.05, 0.15], [0.05, 0.01, 0.09], "above every single-pass baseline on errors"),
        (
            [0.1, -0.05, 0.15],
            [0.05, 0.01, 0.09],
            "above the best single-pass baseline, but not clearly above every one, on errors",
        ),
        ([0.1, 0.05, 0.15], [0.05, -0.01, 0.09], "not distinguishable from the best single-pass baseline on errors"),
        ([0.1, 0.05, 0.15], [-0.05, -0.09, -0.01], "below the best single-pass baseline on errors"),
    ],
)
def test_sentences_follow_from_the_intervals(to_energy: list[float], to_gen: list[float], sentence: str) -> None:
    lines = conclusions(run({"energy": to_energy, "gen": to_gen, "views(score=gen)": [-0.5, -0.6, -0.4]}))
    assert lines[0].startswith(f"- `trust` is {sentence}")
    assert "views" not in "\n".join(lines)  # a score of ten passes is not compared with one of a single pass


def test_a_score_of_ten_passes_is_compared_at_both_costs() -> None:
    content = run({})
    content["rows"].append(row("trust_views", 0.96, 10))  # type: ignore[attr-defined]
    for against in ("gen", "views(score=gen)"):
        entry = {"challenger": "trust_views", "against": against, "column": "errors", "difference": [0.1, 0.05, 0.2]}
        content["comparisons"].append(entry)  # type: ignore[attr-defined]
    text = "\n".join(conclusions(content))
    assert "| `trust(views=10)` | single-pass baseline | not equal | +10.00 (5.00 to 20.00) `gen` |" in text
    assert (
        "| `trust(views=10)` | baseline with as many forward passes | equal | +10.00 (5.00 to 20.00) `views(score=gen)` |"
        in text
    )


def test_variants_of_trust_are_an_ablation_and_not_rivals() -> None:
    content = run({"energy": [0.1, 0.05, 0.15], "trust(distance=none)": [0.02, 0.01, 0.03]})
    content["rows"].append(row("trust(distance=none)", 0.99))  # type: ignore[attr-defined]
    text = "\n".join(section(content))
    assert "above every single-pass baseline" in text
    assert "| `trust(distance=none)` | −2.00 (−3.00 to −1.00) |" in text


def test_original_and_reencoded_files_are_shown_side_by_side() -> None:
    content = run({}) | {"originals": {"near": "near_original"}}
    for line in content["rows"]:  # type: ignore[attr-defined]
        line["near_original"] = [0.97, 0.96, 0.98]
    text = "\n".join(section(content))
    assert "| score | near, original files | near, re-encoded | change |" in text
    assert "| `energy` | 97.0 (96.0 to 98.0) | 80.0 (79.0 to 81.0) | −17.0 |" in text


def test_differences_are_of_the_challenger_and_of_a_group_its_mean() -> None:
    entry = {"score": "energy", "baseline": "trust", "task": "joint", "group": "far", "metric": "auroc"}
    sets = [{**entry, "dataset": name, "difference": -0.5, "low": -0.6, "high": -0.4} for name in ("a", "b")]
    mean = {**entry, "dataset": None, "difference": -0.1, "low": -0.3, "high": 0.1}
    (found,) = differences_of([*sets, mean])
    assert found == {"challenger": "trust", "against": "energy", "column": "joint far", "difference": [0.1, -0.1, 0.3]}
    assert column_of({"task": "misclassification", "group": "id"}) == "errors"


@pytest.mark.slow
def test_the_command_writes_the_file_that_the_page_reads(command, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    options = ["logger=none", "report=false", "resamples=20", "data.patches=30", "data.fit=60", "cost_batch_size=null"]
    found = command("experiment=leaderboard_digits", *options, f"hydra.run.dir={tmp_path}")
    assert found.returncode == 0, found.stderr
    content = json.loads((tmp_path / "leaderboard.json").read_text())
    assert {entry["challenger"] for entry in content["comparisons"]} == {"trust", "trust_views"}
    assert content["notes"] and content["command"].startswith("gradmetrics experiment=leaderboard_digits logger=none")
    assert "### Do gradient norms help" in page([content])
