"""Measure how often 95 % intervals of ``evaluate`` contain the true value: ``python -m benchmarks intervals``.

Scores of negatives are standard normal; those of positives are shifted. The true AUROC and FPR95 are therefore known
exactly. The true AUPR is computed from a large sample.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table
from scipy.stats import norm

from lightning_gradmetrics.evaluation import evaluate

SHIFTS = (1.0, 2.0, 4.37)
SIZES = ((90, 10), (100, 60), (200, 200), (1000, 100), (1000, 1000))
METRICS = ("auroc", "fpr95", "aupr")
LARGE = 400_000


def results(rng: np.random.Generator, negatives: int, positives: int, shift: float) -> pa.Table:
    """Return a results table: negatives are correct predictions, positives are errors."""
    incorrect = np.arange(negatives + positives) >= negatives
    size = len(incorrect)
    columns = {
        "dataset": pa.DictionaryArray.from_arrays(pa.array(np.zeros(size, dtype=np.int32)), ["test"]),
        "index": np.arange(size),
        "prediction": incorrect.astype(np.int64),
        "label": np.zeros(size, dtype=np.int64),
        "s0": shift * incorrect + rng.normal(size=size),
    }
    return pa.table(columns)


def values(table: pa.Table, **options: Any) -> dict[str, dict[str, Any]]:
    """Return the evaluation entries of the score, by metric."""
    evaluation = evaluate(table, ["s0"], {"test": "id"}, **options)
    entries = {}
    for entry in evaluation.find(task="misclassification"):
        entries[entry["metric"]] = entry
    return entries


def true_values(shift: float, negatives: int, positives: int) -> dict[str, float]:
    """Return the true value of each metric."""
    fraction = positives / (negatives + positives)
    large = results(np.random.default_rng(1), round(LARGE * (1 - fraction)), round(LARGE * fraction), shift)
    truth = {metric: entry["value"] for metric, entry in values(large, resamples=0).items()}
    truth["auroc"] = float(norm.cdf(shift / np.sqrt(2)))
    truth["fpr95"] = float(norm.sf(norm.ppf(0.05) + shift))
    return truth


def coverage(shift: float, negatives: int, positives: int, runs: int, resamples: int) -> dict[str, float | None]:
    """Return the fraction of intervals that contain the true value; None if no interval was computed."""
    truth = true_values(shift, negatives, positives)
    contains_truth: dict[str, list[bool]] = {metric: [] for metric in METRICS}
    for seed in range(runs):
        table = results(np.random.default_rng(seed), negatives, positives, shift)
        for metric, entry in values(table, resamples=resamples, seed=seed).items():
            if metric in contains_truth and entry["low"] is not None:
                contains_truth[metric].append(entry["low"] <= truth[metric] <= entry["high"])
    return {metric: float(np.mean(inside)) if inside else None for metric, inside in contains_truth.items()}


def show_coverage(console: Console, runs: int, resamples: int) -> None:
    """Print the coverage table."""
    table = Table(title=f"Coverage of 95 % intervals in %, {runs} runs, {resamples} resamples")
    for heading in ("negatives", "positives", "true AUROC", *METRICS):
        table.add_column(heading, justify="right")
    for shift in SHIFTS:
        for negatives, positives in SIZES:
            fractions = coverage(shift, negatives, positives, runs, resamples)
            cells = ["–" if fraction is None else f"{100 * fraction:.0f}" for fraction in fractions.values()]
            table.add_row(str(negatives), str(positives), f"{norm.cdf(shift / np.sqrt(2)):.3f}", *cells)
    console.print(table)


def main(arguments: Sequence[str]) -> None:
    """Run the simulation and print the coverage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks intervals", description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="simulated datasets per row")
    parser.add_argument("--resamples", type=int, default=200)
    options = parser.parse_args(arguments)
    show_coverage(Console(width=100), options.runs, options.resamples)
