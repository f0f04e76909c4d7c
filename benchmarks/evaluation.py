"""Measure the time and memory of evaluating a table in memory, or a results directory with binned scores."""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

import lightning_gradmetrics as lgm
from benchmarks.measure import environment
from lightning_gradmetrics.results.parts import ResultsWriter

__all__ = ["main"]

ROLES = {"test": "id", "far": "far"}
ROWS_AT_ONCE = 250_000


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate; print and write the seconds and the memory."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks evaluation", description=__doc__)
    parser.add_argument("--rows", type=float, default=1e6)
    parser.add_argument("--scores", type=int, default=20)
    parser.add_argument("--resamples", type=int, nargs="*", default=[0, 1000])
    parser.add_argument("--directory", action="store_true", help="write a results directory and evaluate it in bins")
    parser.add_argument("--bins", type=int, default=16_384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows, scores = int(options.rows), [f"score{number}" for number in range(options.scores)]
    facts = {**environment("cpu"), "rows": rows, "scores": options.scores, "threads": options.threads}
    with tempfile.TemporaryDirectory() as folder:
        bins = None
        if options.directory:
            results: Any = _written_results(Path(folder) / "results", rows, scores)
            bins, facts["bins"] = options.bins, options.bins
        else:
            results = pa.concat_tables(_tables(rows, scores))
        facts["megabytes_before"] = _largest_megabytes()
        for resamples in options.resamples:
            wall, cpu = time.perf_counter(), time.process_time()
            evaluation = lgm.evaluation.evaluate(
                results, scores, ROLES, [scores[0]], baseline=scores[0], resamples=resamples, bins=bins
            )
            facts[f"resamples_{resamples}"] = {
                "seconds": round(time.perf_counter() - wall, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
                "largest_megabytes": _largest_megabytes(),
                "bootstrap": evaluation.settings["bootstrap"],
                "notes": [note for note in evaluation.notes if "bins" in note],
            }
    print(json.dumps(facts, indent=2))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "evaluation.json").write_text(json.dumps(facts, indent=2) + "\n")


def _tables(rows: int, scores: Sequence[str]) -> Iterator[pa.Table]:
    """Yield results: one half in-distribution with 10 % errors, the other out-of-distribution."""
    generator = np.random.default_rng(0)
    for dataset, size in (("test", rows // 2), ("far", rows - rows // 2)):
        for start in range(0, size, ROWS_AT_ONCE):
            index = np.arange(start, min(start + ROWS_AT_ONCE, size))
            wrong = generator.random(len(index)) < (0.1 if dataset == "test" else 0.9)
            columns = {
                "dataset": pa.repeat(dataset, len(index)),
                "index": index,
                "prediction": wrong.astype(np.int64),
                "label": np.zeros(len(index), dtype=np.int64),
            }
            for number, score in enumerate(scores):
                columns[score] = wrong * (1 + 0.02 * number) + generator.normal(size=len(index))
            yield pa.table({**columns, "finite": np.ones(len(index), dtype=bool)})


def _written_results(directory: Path, rows: int, scores: Sequence[str]) -> Path:
    with ResultsWriter(directory, {}, rows_per_part=ROWS_AT_ONCE) as writer:
        for table in _tables(rows, scores):
            writer.add(table)
        writer.finish({"test": rows // 2, "far": rows - rows // 2})
    return directory


def _largest_megabytes() -> int:
    """Return the largest resident memory of this process so far, in MiB (Linux)."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
