"""Chooses the store of a run: memory, or the user's directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from lightning.pytorch import Trainer
from torch import nn

from lightning_gradmetrics.callback.describing import describe_circumstances, describe_run
from lightning_gradmetrics.callback.processes import Processes
from lightning_gradmetrics.evaluation import Thresholds
from lightning_gradmetrics.results.output import Output, check_limits
from lightning_gradmetrics.results.rows import Rows
from lightning_gradmetrics.results.stores import DirectoryStore, MemoryStore, Store
from lightning_gradmetrics.scoring.scorer import Scorer

__all__ = ["is_limited", "store_of"]


def store_of(
    output: Output | None,
    rows: Sequence[Rows],
    loaders: Sequence[Any],
    thresholds: Thresholds | None,
    scorer: Scorer,
    model: nn.Module,
    roles: Mapping[str, str],
    others: Mapping[str, Any],
    processes: Processes,
    limited: bool,
) -> Store:
    """Return the store of a run.

    Args:
        output: Where to store the results; ``None`` for memory.
        rows: The rows of each dataloader.
        loaders: The dataloaders.
        thresholds: The thresholds, or ``None``.
        scorer: Computes the scores.
        model: The scored model.
        roles: The role of each dataset.
        others: Other arguments that change the results.
        processes: The processes of the run.
        limited: Whether only part of the batches is scored.

    Raises:
        FileExistsError: If the directory contains results and the run does not resume them.
        ResumeError: If it contains the results of another run; the message names the difference.
        RuntimeError: If another run writes to it, or another process of this run fails.
    """
    complete = _unchanged if thresholds is None else thresholds.apply
    if output is None:
        return MemoryStore(rows, complete)
    check_limits(output, limited)
    named = dict(zip((table.dataset for table in rows), loaders, strict=True))
    run = processes.from_first(lambda: describe_run(scorer, model, named, roles, thresholds, others))
    about = describe_circumstances(named, processes.count)

    def start() -> DirectoryStore:
        return DirectoryStore.start(
            output, rows, loaders, run, about, complete, rank=processes.rank, is_limited=limited
        )

    store = processes.together(start)
    changes = store.changes()
    if changes is not None:
        processes.warn(f"the interrupted run differs: {changes}; scores can differ in their last digits")
    return store


def _unchanged(table: pa.Table) -> pa.Table:
    return table


def is_limited(trainer: Trainer, stage: str) -> bool:
    """Return whether a trainer runs only some of the batches of a stage."""
    limits = {
        "validate": trainer.limit_val_batches,
        "test": trainer.limit_test_batches,
        "predict": trainer.limit_predict_batches,
    }
    limit = limits.get(stage, 1.0)
    return bool(trainer.fast_dev_run) or not (isinstance(limit, float) and limit == 1.0)  # type: ignore[attr-defined]
