"""The list of all scores for the terminal."""

from __future__ import annotations

from rich import box
from rich.markup import escape
from rich.table import Table

from lightning_gradmetrics.cli.score_catalogue import lines

__all__ = ["scores_table"]


def scores_table() -> Table:
    """Return all registered scores: summary, paper, needs, cost, sign and arguments; long texts are wrapped."""
    table = Table(title="Scores: each is an uncertainty, higher = more uncertain", title_justify="left")
    table.box, table.pad_edge = box.SIMPLE_HEAD, False
    table.add_column("score", no_wrap=True)
    table.add_column("summary, paper, needs, cost, arguments", overflow="fold")
    for line in lines():
        details = [f"{line.paper}; its quantity is {line.sign}", f"needs {line.needs}; {line.cost}"]
        if line.arguments:
            details.append(f"({line.arguments})")
        if line.aliases:
            details.append(f"also: {line.aliases}")
        summary = line.summary.replace("``", "")
        table.add_row(escape(line.name), f"{escape(summary)}\n[dim]{escape(chr(10).join(details))}[/dim]")
    return table
