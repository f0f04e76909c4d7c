"""A table as plain data: rows, and groups of columns under two-level headings. Text is never shortened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.cells import cell_len

from lightning_gradmetrics.results.escaping import visible

__all__ = ["Column", "Grid", "Group"]

COLUMN_GAP = 2
GROUP_GAP = 3
LONGEST_GROUP_LINE = 18
"""Group headings that are longer than this and wider than their columns are folded."""


@dataclass(frozen=True)
class Column:
    """One column of a grid.

    Args:
        heading: The heading; several lines are separated by newlines.
        cells: One text per row; several lines are separated by newlines.
        best: The rows to print in bold.
        left: Whether the texts are aligned to the left.
    """

    heading: str
    cells: tuple[str, ...]
    best: frozenset[int] = frozenset()
    left: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "heading", visible(self.heading))
        object.__setattr__(self, "cells", tuple(map(visible, self.cells)))

    @property
    def width(self) -> int:
        """The widest line, in characters."""
        lines = "\n".join((self.heading, *self.cells)).split("\n")
        return max(map(cell_len, lines))


@dataclass(frozen=True)
class Group:
    """Adjacent columns under one heading, which may be empty."""

    heading: str
    columns: tuple[Column, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "heading", visible(self.heading))

    @property
    def columns_width(self) -> int:
        """The width of the columns, including the gaps between them."""
        width = COLUMN_GAP * (len(self.columns) - 1)
        for column in self.columns:
            width += column.width
        return width

    @property
    def heading_lines(self) -> list[str]:
        """The lines of the heading, which is folded if it is wider than the columns; no letter is lost."""
        return fold(self.heading, max(self.columns_width, LONGEST_GROUP_LINE))

    @property
    def width(self) -> int:
        """The width of the columns or of the heading, whichever is larger."""
        return max(self.columns_width, *map(cell_len, self.heading_lines), 0)


@dataclass(frozen=True)
class Grid:
    """A table with a column of row names and groups of other columns.

    Args:
        title: A line above the table.
        names: The names of the rows.
        groups: The other columns.
        section_ends: The rows that are followed by an empty line.
        notes: Sentences below the table.
    """

    title: str
    names: Column
    groups: tuple[Group, ...]
    section_ends: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", visible(self.title))
        object.__setattr__(self, "notes", tuple(map(visible, self.notes)))

    @property
    def width(self) -> int:
        """The width of the table in characters."""
        width = self.names.width
        for group in self.groups:
            width += GROUP_GAP + group.width
        return width

    @property
    def has_headings(self) -> bool:
        """Whether a group has a heading."""
        return any(group.heading for group in self.groups)

    @property
    def all_columns(self) -> list[Column]:
        """The row names and every other column."""
        columns = [self.names]
        for group in self.groups:
            columns += group.columns
        return columns

    @property
    def columns(self) -> list[tuple[str, Column]]:
        """Every column except the row names, with its group's heading."""
        columns = []
        for group in self.groups:
            for column in group.columns:
                columns.append((group.heading, column))
        return columns


def fold(text: str, width: int) -> list[str]:
    """Return the text in lines of at most ``width`` characters, broken after spaces, ``_``, ``-``, ``.`` or ``/`` if possible.

    Example:
        >>> fold("near: imagenet_resized_to_32", 16)
        ['near: imagenet_', 'resized_to_32']
    """
    lines = [""]
    for piece in _pieces(text):
        while len(piece.rstrip()) > width:
            lines.append(piece[:width])
            piece = piece[width:]
        if len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines if line.strip()]


def _pieces(text: str) -> Iterator[str]:
    """Yield the pieces of a text between possible line breaks."""
    start = 0
    for position, letter in enumerate(text):
        if letter in " _-./":
            yield text[start : position + 1]
            start = position + 1
    yield text[start:]
