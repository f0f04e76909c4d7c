"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
from rich import box
from rich.markup import escape
from rich.table import Table

from lightning_gradmetrics.cli.score_catalogue import lines
from lightning_gradmetrics.evaluation import Evaluation
from lightning_gradmetrics.scores import Score

__all__ = ["largest_table", "metrics_table", "scores_table"]

Column = tuple[str, str, str]
"""A task, a data set and a metric."""

LOWER_IS_BETTER = frozenset({"aurc", "fpr95"})
SHOWN = {"misclassification": ("auroc", "aurc"), "ood": ("auroc", "fpr95")}


def metrics_table(evaluation: Evaluation, scores: Sequence[Score]) -> Table:
    """A row a score, baselines first; the best figure of each column is bold. All figures are times 100."""
    columns = _columns(evaluation)
    values = {(r["score"], r["task"], r["dataset"], r["metric"]): r["value"] for r in evaluation.metrics}
    best = {column: _best(column, [values.get((s.name, *column)) for s in scores]) for column in columns}
    table = Table(
        title="Figures times 100; bold is the best of a column",
        title_justify="left",
        caption=_caption(evaluation),
        caption_justify="left",
    )
    table.box, table.pad_edge = box.SIMPLE_HEAD, False
    table.add_column("score", no_wrap=True)
    for column in columns:
        table.add_column(_heading(evaluation, column), justify="right", no_wrap=True)
    for family in ("baseline", "gradient"):
        members = [score for score in scores if score.recipe.family == family]
        for number, score in enumerate(members):
            cells = [_cell(values.get((score.name, *column)), best[column]) for column in columns]
            table.add_row(score.name, *cells, end_section=number == len(members) - 1)
    return table


def _columns(evaluation: Evaluation) -> list[Column]:
    """The columns that have a figure, in the order of the data sets."""
    defined = {(r["task"], r["dataset"], r["metric"]) for r in evaluation.metrics if r["value"] is not None}
    datasets = [d["name"] for d in evaluation.datasets]
    wanted = [(task, dataset, metric) for task, metrics in SHOWN.items() for dataset in datasets for metric in metrics]
    return [column for column in wanted if column in defined]


def _heading(evaluation: Evaluation, column: Column) -> str:
    """The data set above its first metric, what is detected above the others."""
    task, dataset, metric = column
    role = next(d["role"] for d in evaluation.datasets if d["name"] == dataset)
    above = dataset if metric == SHOWN[task][0] else "errors" if task == "misclassification" else role
    return f"{above}\n{metric.upper()} {'↓' if metric in LOWER_IS_BETTER else '↑'}"


def _best(column: Column, values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return min(known) if column[2] in LOWER_IS_BETTER else max(known)


def _cell(value: float | None, best: float | None) -> str:
    if value is None:
        return "–"
    text = _percent(value)
    return f"[bold]{text}[/bold]" if best is not None and text == _percent(best) else text


def _percent(value: float) -> str:
    """Times 100, with three digits that count."""
    return f"{100 * value:.1f}" if value >= 0.0995 else f"{100 * value:.2f}"


def _caption(evaluation: Evaluation) -> str:
    sets = [
        f"{d['name']}: {d['rows']} samples ({d['role']})"
        + (f", accuracy {100 * d['accuracy']:.1f}" if d["accuracy"] is not None else "")
        for d in evaluation.datasets
    ]
    return "\n".join(["; ".join(sets), *evaluation.notes])


def largest_table(largest: pa.Table) -> Table:
    """The samples with the largest scores, a line between data sets and scores.

    Args:
        largest: Of :func:`lightning_gradmetrics.results.table.largest_of_each`.
    """
    table = Table(title="Samples with the largest scores", title_justify="left")
    table.box, table.pad_edge = box.SIMPLE_HEAD, False
    for name in ("score", "dataset"):
        table.add_column(name, no_wrap=True)
    for name in ("index", "label", "prediction", "value"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = largest.to_pylist()
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        label = "–" if row["label"] is None else str(row["label"])
        cells = [row["score"], row["dataset"], str(row["index"]), label, str(row["prediction"]), f"{row['value']:.4g}"]
        ends = after is None or (row["score"], row["dataset"]) != (after["score"], after["dataset"])
        table.add_row(*map(escape, cells), end_section=ends)
    return table


def scores_table() -> Table:
    """All registered scores: what each is, its paper, what it needs and costs, its sign and its arguments; 80 columns do."""
    table = Table(title="Scores: every one is an uncertainty, higher = more uncertain", title_justify="left")
    table.box, table.pad_edge = box.SIMPLE_HEAD, False
    table.add_column("score", no_wrap=True)
    table.add_column("what it is, its paper, needs, cost, arguments")
    for line in lines():
        about = [f"{line.paper}; its quantity is {line.sign}", f"needs {line.needs}; {line.cost}"]
        if line.arguments:
            about.append(f"({line.arguments})")
        if line.aliases:
            about.append(f"also: {line.aliases}")
        summary, details = line.summary.replace("``", ""), "\n".join(about)
        table.add_row(escape(line.name), f"{escape(summary)}\n[dim]{escape(details)}[/dim]")
    return table
