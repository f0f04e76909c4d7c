"""Pages of synthetic runs, and their parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_gradmetrics.report import write_report
from tests.report.page_tree import Node, parse, section
from tests.report.report_runs import SETS, make_run

FOUR: dict[str, Any] = {"baselines": ("entropy", "max_softmax"), "gradients": ("gradnorm", "exgrad_all")}
FEW = {"baselines": ("entropy",), "gradients": ("gradnorm",)}
ONE = {"baselines": ("entropy",), "gradients": (), "sets": SETS[:1]}


def page(directory: Path, **options: Any) -> Node:
    return parse(write_report(make_run(directory, **options)))


def rows_of(tree: Node, title: str, number: int = -1) -> dict[str, Node]:
    """Return the rows of a table by the name of their score."""
    part = section(tree, title)
    assert part is not None
    table = part.find("table")[number]
    return {row.find("span", class_="name")[0].text: row for row in table.find("tbody")[0].find("tr")}


def cards(tree: Node) -> dict[str, Node]:
    return {card.find("h2")[0].text: card for card in tree.find("article")}
