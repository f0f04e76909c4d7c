"""The main table at every width: no truncated numbers or names, and the same values in its files."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from rich.console import Console

from lightning_gradmetrics.evaluation import Evaluation, evaluate
from lightning_gradmetrics.report import write_metrics_tables
from lightning_gradmetrics.report.tables import Column, Grid, Group, metrics_grids, print_grid
from lightning_gradmetrics.report.tables.documents import latex, markdown
from lightning_gradmetrics.report.tables.grid import fold
from lightning_gradmetrics.report.tables.metrics import notes_of, questions_of
from lightning_gradmetrics.scores import Score
from lightning_gradmetrics.scoring.registry import make
from tests.models import fast_rows

ROLES = {
    "cifar10": "id",
    "cifar10_corrupted_by_jpeg": "id",
    "imagenet32": "near",
    "imagenet_resized_to_32_pixels": "near",
    "mnist": "far",
    "camvid": "far",
    "textures": "far",
}
LONG_NAME = "pseudo_label_of_all_layers_std_0.25"
assert len(LONG_NAME) == 35
SCORES = [make("max_softmax"), make("oberdiek"), make("confounding_detector"), make("gradorth").named(LONG_NAME)]
SCORES += [make("gradnorm").named(f"gradnorm_{number}") for number in range(27)]


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    """Seven datasets and 31 scores; the long-named one ranks perfectly, so its AUROC is 100.0."""
    rows, generator = 20, torch.Generator().manual_seed(0)
    outside = torch.tensor([role != "id" for role in ROLES.values()]).repeat_interleave(rows)
    scores = {}
    for score in SCORES:
        noise = torch.rand(len(outside), generator=generator)
        scores[score.name] = (outside + 0.1 * noise if score.name == LONG_NAME else noise).tolist()
    columns = {
        "dataset": [name for name in ROLES for _ in range(rows)],
        "index": list(range(rows)) * len(ROLES),
        "prediction": [0] * rows * len(ROLES),
        "label": pa.array([number % 2 for number in range(2 * rows)] + [None] * 5 * rows, pa.int64()),
    }
    table = pa.table({**columns, **scores, "finite": [True] * len(outside)})
    return evaluate(table, list(scores), ROLES, ["max_softmax"], resamples=0)


def printed(evaluation: Evaluation, scores: list[Score], width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    for grid in metrics_grids(evaluation, scores, width):
        print_grid(console, grid)
    return console.file.getvalue()


@pytest.mark.parametrize("width", fast_rows([60, 80, 100, 160, 400], [80]))
def test_numbers_and_names_are_never_truncated(evaluation: Evaluation, width: int) -> None:
    shown = printed(evaluation, SCORES, width)
    assert "…" not in shown and "..." not in shown
    assert max(len(line) for line in shown.splitlines()) <= width
    lines = [line.split() for line in shown.splitlines()]
    for score in SCORES:
        rows = [line for line in lines if line[:1] == [score.name]]
        assert rows, score.name
        for row in rows:
            numbers = [cell for cell in row[1:] if cell not in ("f", "fl", "fo") and "×" not in cell]
            assert numbers and all(re.fullmatch(r"\d+\.\d+|–", cell) for cell in numbers), row
    assert "100.0" in shown


@pytest.mark.slow
def test_columns_are_dropped_in_the_stated_order(evaluation: Evaluation) -> None:
    """Columns are dropped in the order: FPR95 and AURC; one grid per question; its FPR95 and AURC; all but its mean."""
    (everything,) = metrics_grids(evaluation, SCORES, 800)
    assert not everything.notes and len(everything.columns) == 1 + 2 * (3 + 3 + 4 + 3 + 4)
    apart, joint = metrics_grids(evaluation, SCORES, everything.width - 1)
    assert not joint.notes and [len(apart.columns), len(joint.columns)] == [1 + 2 * (3 + 3 + 4), 1 + 2 * (3 + 4)]
    aurocs, _ = metrics_grids(evaluation, SCORES, apart.width - 1)
    assert len(aurocs.columns) == 1 + 10
    blocks = metrics_grids(evaluation, SCORES, aurocs.width - 1)
    assert [len(block.columns) - 1 for block in blocks[:3]] == [6, 6, 8] and not blocks[-1].notes
    blocks = metrics_grids(evaluation, SCORES, max(block.width for block in blocks[:3]) - 1)
    assert [len(block.columns) - 1 for block in blocks[:3]] == [6, 6, 4]
    narrow = metrics_grids(evaluation, SCORES, 64)
    assert [len(block.columns) - 1 for block in narrow] == [2, 2, 2, 2, 2]
    assert narrow[-1].notes == (
        "errors: 2 more datasets in metrics.csv.",
        "near: 2 more datasets in metrics.csv.",
        "far: 3 more datasets in metrics.csv.",
        "errors and near: 2 more datasets in metrics.csv.",
        "errors and far: 3 more datasets in metrics.csv.",
    )


def test_headings_have_two_levels(evaluation: Evaluation) -> None:
    lines = printed(evaluation, SCORES, 400).splitlines()
    heading = next(line for line in lines if " far: mnist" in line)
    position = heading.index("far: mnist")
    below = next(line for line in lines if line.startswith("score"))
    assert below[position - 4 : position + 13].split() == ["AUROC", "↑", "FPR95", "↓"]


def test_marks_and_notes(evaluation: Evaluation) -> None:
    lines = printed(evaluation, SCORES, 400).splitlines()
    marks = {
        line.split()[0]: line.split()[1] for line in lines if line.startswith(("oberdiek", "confounding", LONG_NAME))
    }
    assert marks == {"oberdiek": "fl", "confounding_detector": "fo", LONG_NAME: "f"}
    notes = " ".join(notes_of(evaluation, SCORES))
    assert "fl: fitted on held-out samples and their labels" in notes and "reads the true label" not in notes


def test_questions(evaluation: Evaluation) -> None:
    assert [(question.name, len(question.datasets)) for question in questions_of(evaluation)] == [
        ("errors", 2),
        ("near", 2),
        ("far", 3),
        ("errors and near", 2),
        ("errors and far", 3),
    ]


def test_files_have_every_number(evaluation: Evaluation, tmp_path: Path) -> None:
    write_metrics_tables(evaluation, SCORES, tmp_path)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert len(rows) == len(evaluation.metrics) and {row["fit"] for row in rows} >= {"", "fitted on labels"}
    values = {
        (m["score"], m["task"], m["dataset"] or "", m["metric"], m["group"]): m["value"] for m in evaluation.metrics
    }
    for row in rows:
        value = values[row["score"], row["task"], row["dataset"], row["metric"], row["group"]]
        assert row["value"] == ("" if value is None else repr(value))
    table = (tmp_path / "table.md").read_text()
    assert table.count("| far: mean of 3 AUROC ↑ |") == 1 and LONG_NAME in table
    source = (tmp_path / "table.tex").read_text()
    assert r"\multicolumn{2}{c}{far: mean of 3}" in source and r"\textbf{100.0}" in source
    body = source[source.index(r"\toprule") : source.index(r"\bottomrule")]
    assert len({line.count("&") for line in body.splitlines() if line.endswith(r"0 \\") or r" & 1" in line}) == 1


def test_special_characters_are_escaped() -> None:
    grid = Grid(
        "", Column("score", ("a|b_%",), left=True), (Group("x & y", (Column("AUROC ↑", ("1.0",), frozenset({0})),)),)
    )
    assert r"a\|b_%" in markdown(grid) and "**1.0**" in markdown(grid)
    assert r"a|b\_\% & \textbf{1.0} \\" in latex(grid) and r"x \& y" in latex(grid)
    console = Console(width=40, file=io.StringIO())
    print_grid(console, Grid("[bold]t", Column("[red]s", ("[x]",), left=True), grid.groups))
    shown = console.file.getvalue()
    assert "[bold]t" in shown and "[red]s" in shown and "[x]" in shown


@pytest.mark.parametrize("text", ["near: imagenet_resized_to_32_pixels", "x" * 40, "a b", ""])
def test_folding_loses_no_letter(text: str) -> None:
    lines = fold(text, 16)
    assert all(len(line) <= 16 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_a_table_wider_than_the_console_is_not_shortened() -> None:
    console = Console(width=10, file=io.StringIO())
    print_grid(
        console, Grid("", Column("score", ("a_long_name",), left=True), (Group("", (Column("AUROC", ("100.0",)),)),))
    )
    assert "a_long_name   100.0" in console.file.getvalue()
