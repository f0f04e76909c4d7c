"""Grids as Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lightning_gradmetrics.report.tables.grid import Column, Grid

__all__ = ["latex", "markdown"]

LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "–": "--",
    "±": r"$\pm$",
}


LATEX_ESCAPES = str.maketrans(LATEX_SPECIAL)


def markdown(grid: Grid) -> str:
    """Return the grid as a Markdown table with its notes below; group headings become part of the column headings."""
    headings = [_markdown_text(grid.names.heading)]
    for group, column in grid.columns:
        headings.append(_markdown_text(f"{group} {column.heading}".strip()))
    columns = grid.all_columns
    alignment = []
    for column in columns:
        alignment.append("---" if column.left else "---:")
    lines = []
    for cells in (headings, alignment, *_rows(columns, _markdown_cell)):
        lines.append(f"| {' | '.join(cells)} |")
    return "\n\n".join(["\n".join(lines), *grid.notes]) + "\n"


def _rows(columns: Sequence[Column], text_of: Callable[[Column, int], str]) -> Iterator[list[str]]:
    """Yield the texts of each row."""
    for row in range(len(columns[0].cells)):
        yield [text_of(column, row) for column in columns]


def _markdown_text(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


def _markdown_cell(column: Column, row: int) -> str:
    text = _markdown_text(column.cells[row])
    return f"**{text}**" if row in column.best else text


def latex(grid: Grid) -> str:
    """Return the grid as a LaTeX ``tabular`` for the package booktabs, with its notes as comments.

    Reference:
        S. Fear, "Publication quality tables in LaTeX", the manual of booktabs.
    """
    columns, alignment, headings = grid.all_columns, "", []
    for column in columns:
        alignment += "l" if column.left else "r"
        headings.append(_latex_text(column.heading))
    lines = [rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", *_latex_group_headings(grid)]
    lines.append(rf"{' & '.join(headings)} \\")
    lines.append(r"\midrule")
    for number, row in enumerate(_rows(columns, _latex_cell)):
        lines.append(rf"{' & '.join(row)} \\")
        if number in grid.section_ends:
            lines.append(r"\midrule")
    lines += [r"\bottomrule", r"\end{tabular}"]
    comments = ["% needs \\usepackage{booktabs}"]
    for note in grid.notes:
        comments.append(f"% {note}")
    return "\n".join([*comments, *lines]) + "\n"


def _latex_group_headings(grid: Grid) -> list[str]:
    if not grid.has_headings:
        return []
    cells, rules, position = [""], [], 2
    for group in grid.groups:
        last = position + len(group.columns) - 1
        cells.append(rf"\multicolumn{{{len(group.columns)}}}{{c}}{{{_latex_text(group.heading)}}}")
        if group.heading:
            rules.append(rf"\cmidrule(lr){{{position}-{last}}}")
        position = last + 1
    return [rf"{' & '.join(cells)} \\", " ".join(rules)]


def _latex_text(text: str) -> str:
    return text.replace("\n", " ").translate(LATEX_ESCAPES)


def _latex_cell(column: Column, row: int) -> str:
    text = _latex_text(column.cells[row])
    return rf"\textbf{{{text}}}" if row in column.best else text
