"""All scores in one table: how well each detects, what it costs, and what it needs."""

from __future__ import annotations

import csv
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import Inputs, batch_size, call, preserved
from lightning_gradmetrics.evaluation import Evaluation
from lightning_gradmetrics.scores import FittedScore, Score
from lightning_gradmetrics.scoring.scorer import Scorer
from lightning_gradmetrics.scoring.step import Watch

__all__ = ["benchmark_records", "benchmark_table", "score_costs", "write_benchmark"]

Record = dict[str, Any]
Area = tuple[float, float | None, float | None]
"""An AUROC and its interval."""
ERRORS = "errors"
FIT = {(True, True): "ID and OOD", (True, False): "ID and OOD", (False, True): "ID, labels", (False, False): "ID"}
"""What a fitted score is fitted on, by whether its fit looks at roles and at labels."""
NEEDS = {"L": "labels", "F": "fit", "B": "backward"}


def score_costs(
    model: nn.Module,
    inputs: Inputs,
    labels: Tensor | None,
    scores: Iterable[Score],
    repeats: int = 7,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Record]:
    """Time and memory of each score alone on one batch, beside a plain prediction of it.

    A score's run is the prediction and all that the score needs of it. Every repeat times a plain prediction and then
    the score, and the ratio is taken within it, so that what else the machine does falls on both. The first run, which
    plans and compiles, is not counted.

    Args:
        model: A classifier in eval mode; it comes back as it was.
        inputs: A batch ``(N, ...)`` on the model's device.
        labels: Its true labels ``(N,)``, for the scores that need them.
        scores: The scores; those that are fitted, with their state.
        repeats: Timed runs; the medians are given.
        progress: Called with each score's name before it is measured.

    Returns:
        One dict a score: ``score``; ``milliseconds`` a sample, all included; ``predictions``, the same in plain
        predictions; ``extra_mib``, the peak of memory that torch allocated above that of a plain prediction.

    Raises:
        ValueError: If the batch has no samples.

    Example:
        >>> from lightning_gradmetrics.scores import make
        >>> model = nn.Sequential(nn.Linear(4, 3)).eval()
        >>> [record] = score_costs(model, torch.randn(8, 4), None, [make("entropy")], repeats=1)
        >>> sorted(record)
        ['extra_mib', 'milliseconds', 'predictions', 'score']
    """
    size = batch_size(inputs)
    if not size:
        raise ValueError("costs are measured on a batch of at least 1 sample, and this one has none")

    def predict() -> None:
        with preserved(model), torch.no_grad():
            call(model, inputs)

    predict()
    base, records = _peak(predict, model), []
    for score in scores:
        progress(score.name)
        run = _run_of(model, inputs, labels, score)
        run()
        times = [(_seconds(predict, model), _seconds(run, model)) for _ in range(repeats)]
        records.append(
            {
                "score": score.name,
                "milliseconds": 1e3 * statistics.median(own for _, own in times) / size,
                "predictions": statistics.median(own / plain for plain, own in times),
                "extra_mib": max(0, _peak(run, model) - base) / 2**20,
            }
        )
    return records


def _run_of(model: nn.Module, inputs: Inputs, labels: Tensor | None, score: Score) -> Callable[[], None]:
    scorer = Scorer((score,))
    watch = Watch(scorer, model)

    def run() -> None:
        scorer(watch.evidence(inputs, labels))

    return run


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _seconds(run: Callable[[], None], model: nn.Module) -> float:
    wait = torch.cuda.synchronize if _device(model).type == "cuda" else nullcontext
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def _peak(run: Callable[[], None], model: nn.Module) -> int:
    """Bytes that torch held at most during a run, beyond those before it."""
    if _device(model).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler greets on stderr each time
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# The table


def benchmark_records(evaluation: Evaluation, scores: Sequence[Score], costs: Sequence[Record]) -> list[Record]:
    """One dict a score: AUROC of each question with its interval, costs and needs.

    Args:
        evaluation: What the run's results say; a score that is not in them has no AUROC.
        scores: The scores.
        costs: Of :func:`score_costs`.

    Returns:
        ``score``, ``family``; ``aurocs``, from a question (``"errors"``, or a role of out-of-distribution sets, over
        which it is the mean) to ``(value, low, high)``, missing where there is none; the costs; ``labels``, whether it
        looks at the true label of the row that it scores; ``fit``, what it is fitted on, or ``""``; ``backward``,
        whether it takes a backward pass.
    """
    known = {record["score"]: record for record in costs}
    return [
        {
            "score": score.name,
            "family": score.recipe.family,
            "aurocs": _aurocs(evaluation, score.name),
            **{key: known[score.name][key] for key in ("milliseconds", "predictions", "extra_mib")},
            "labels": score.needs.labels,
            "fit": _fit(score),
            "backward": score.needs.backward,
        }
        for score in scores
    ]


def _aurocs(evaluation: Evaluation, name: str) -> dict[str, Area]:
    """By question; of a role with several sets it is the mean over them."""
    found: dict[str, Area] = {}
    for record in evaluation.find(score=name, metric="auroc"):
        question = ERRORS if record["task"] == "misclassification" else record["group"]
        if record["value"] is not None and (question not in found or record["dataset"] is None):
            found[question] = (record["value"], record["low"], record["high"])
    return found


def _fit(score: Score) -> str:
    if not isinstance(score, FittedScore):
        return ""
    needs = score.fit_needs
    return FIT[needs.ood, needs.labels]


def _questions(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(question for record in records for question in record["aurocs"]))


def benchmark_table(records: Sequence[Record]) -> Table:
    """A row a score, baselines first; the largest AUROC of each column is bold. 80 columns do."""
    caption = "L: looks at the true label. F: is fitted. B: takes a backward pass."
    table = Table(title="AUROC times 100 with 95 % intervals, costs and needs", title_justify="left", caption=caption)
    table.box, table.padding, table.caption_justify = box.SIMPLE_HEAD, 0, "left"
    questions = _questions(records)
    table.add_column("score", overflow="fold", min_width=23)
    for name in (*questions, "ms a\nsample", "extra\nMiB", ""):
        table.add_column(name, justify="right", no_wrap=True)
    best = {q: max(r["aurocs"][q][0] for r in records if q in r["aurocs"]) for q in questions}
    for record, after in zip(_ordered(records), [*_ordered(records)[1:], None], strict=True):
        areas = {q: record["aurocs"].get(q) for q in questions}
        cells = [f"[bold]{_area(a, 0)}[/bold]" if a and a[0] == best[q] else _area(a, 0) for q, a in areas.items()]
        flags = "".join(letter if record[key] else " " for letter, key in NEEDS.items())
        ends = after is not None and after["family"] != record["family"]
        figures = f"{record['milliseconds']:.3f}", f"{record['extra_mib']:.1f}", flags
        table.add_row(escape(record["score"]), *cells, *figures, end_section=ends)
    return table


def _ordered(records: Sequence[Record]) -> list[Record]:
    return sorted(records, key=lambda record: record["family"])


def _cells(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table, as text."""
    questions = _questions(records)
    head = ["score", *questions, "ms a sample", "predictions", "extra MiB", "label", "fit", "backward"]
    return head, [[r["score"], *(_area(r["aurocs"].get(q)) for q in questions), *_about(r)] for r in _ordered(records)]


def _area(found: Area | None, digits: int = 1) -> str:
    if found is None:
        return "–"
    value, low, high = (100 * part if part is not None else None for part in found)
    shown = f"{value:.{1 if digits or found[0] < 0.9995 else 0}f}"
    if low is None or high is None:
        return shown
    return f"{shown} ({low:.1f}–{high:.1f})" if digits else f"{shown} {low:.0f}–{high:.0f}"


def _about(record: Record) -> list[str]:
    figures = [f"{record['milliseconds']:.3f}", f"{record['predictions']:.2f}", f"{record['extra_mib']:.1f}"]
    return [*figures, "yes" if record["labels"] else "", record["fit"], "yes" if record["backward"] else ""]


def write_benchmark(records: Sequence[Record], directory: Path) -> None:
    """Write ``benchmark.csv``, figures in full, and ``benchmark.md``, the table as Markdown."""
    questions = _questions(records)
    rows = []
    for record in _ordered(records):
        row = {key: value for key, value in record.items() if key != "aurocs"}
        for question in questions:
            names = (f"{question}_{end}" for end in ("auroc", "low", "high"))
            row |= dict(zip(names, record["aurocs"].get(question, (None,) * 3), strict=True))
        rows.append(row)
    with (directory / "benchmark.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    head, cells = _cells(records)
    lines = [head, ["---"] * len(head), *([f"`{row[0]}`", *row[1:]] for row in cells)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    (directory / "benchmark.md").write_text(text + "\n", encoding="utf-8")
