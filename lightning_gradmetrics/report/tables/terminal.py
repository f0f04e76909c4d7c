"""Prints grids on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from io import StringIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from lightning_gradmetrics.report.tables.grid import COLUMN_GAP, GROUP_GAP, Column, Grid, Group

__all__ = ["grids_text", "print_grid", "print_line"]


def print_grid(console: Console, grid: Grid) -> None:
    """Print a grid. Lines that are wider than the console are not shortened."""
    console.print()
    if grid.title:
        console.print(Text(grid.title, "italic"))
        console.print()
    for line in grid_lines(grid):
        print_line(console, line)
    console.print()
    for note in grid.notes:
        console.print(Text(note), overflow="fold")


def grids_text(grids: Sequence[Grid], width: int) -> str:
    """Return grids as the text that would be printed.

    Args:
        grids: The grids.
        width: The number of characters in a line; notes are wrapped.
    """
    console = Console(file=StringIO(), width=width, color_system=None)
    for grid in grids:
        print_grid(console, grid)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def print_line(console: Console, line: str | Text) -> None:
    """Print a line without markup, wrapping or shortening."""
    text = line if isinstance(line, Text) else Text(line)
    console.print(text, soft_wrap=True)


def grid_lines(grid: Grid) -> Iterator[Text]:
    """Yield the lines of a grid: group headings with a rule below each, column headings, a rule, and the rows."""
    yield from _group_heading_lines(grid)
    yield from _block(grid, lambda column: (column.heading, False))
    yield Text("─" * grid.width, "dim")
    for row in range(len(grid.names.cells)):
        yield from _block(grid, _cell_of(row))
        if row in grid.section_ends:
            yield Text("")


def _cell_of(row: int) -> Callable[[Column], tuple[str, bool]]:
    return lambda column: (column.cells[row], row in column.best)


def _group_heading_lines(grid: Grid) -> Iterator[Text]:
    if not grid.has_headings:
        return
    height = max(len(group.heading_lines) for group in grid.groups)
    for number in range(height):
        line = Text(" " * grid.names.width)
        for group in grid.groups:
            lines = group.heading_lines
            padded = [""] * (height - len(lines)) + lines
            line.append(" " * GROUP_GAP + padded[number].center(group.width), "bold")
        yield _trimmed(line)
    rules = Text(" " * grid.names.width)
    for group in grid.groups:
        rules.append(" " * GROUP_GAP + ("─" if group.heading else " ") * group.width, "dim")
    yield rules


def _block(grid: Grid, text_of: Callable[[Column], tuple[str, bool]]) -> Iterator[Text]:
    """Yield the lines of one row, or of the column headings."""
    height = max(text_of(column)[0].count("\n") + 1 for column in grid.all_columns)
    for number in range(height):
        line = _aligned(grid.names, text_of, number)
        for group in grid.groups:
            line.append(" " * (GROUP_GAP + group.width - group.columns_width))
            line.append_text(_group_line(group, text_of, number))
        yield _trimmed(line)


def _group_line(group: Group, text_of: Callable[[Column], tuple[str, bool]], number: int) -> Text:
    cells = []
    for column in group.columns:
        cells.append(_aligned(column, text_of, number))
    return Text(" " * COLUMN_GAP).join(cells)


def _aligned(column: Column, text_of: Callable[[Column], tuple[str, bool]], number: int) -> Text:
    text, bold = text_of(column)
    lines: Sequence[str] = text.split("\n")
    line = lines[number] if number < len(lines) else ""
    padding = " " * (column.width - cell_len(line))
    styled = Text(line, "bold" if bold else "")
    return styled.append(padding) if column.left else Text(padding).append_text(styled)


def _trimmed(line: Text) -> Text:
    line.rstrip()
    return line
