"""What a run does with each batch, and at its end: score the samples, or fit scores on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from lightning_gradmetrics.callback.processes import Processes
from lightning_gradmetrics.pictures import PictureSource, ScoredBatch
from lightning_gradmetrics.results.sample_index import REPEATED
from lightning_gradmetrics.results.table import Rows, empty_results, merge_results
from lightning_gradmetrics.scores import FittedScore
from lightning_gradmetrics.scoring.batch import ObservedBatch
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.fitting import Fitting
from lightning_gradmetrics.scoring.scorer import Scorer

__all__ = ["FitStage", "ScoreStage", "Stage"]


@dataclass
class ScoreStage:
    """Scores every sample.

    Args:
        scorer: Computes the scores.
        rows: The results of each dataloader.
        sources: Read the batches too, and make pictures.
    """

    scorer: Scorer
    rows: Sequence[Rows]
    sources: Sequence[PictureSource] = ()

    def ood(self, place: int, size: int) -> Tensor | None:
        """Returns None: while scoring, roles are not used."""
        return None

    def add(self, place: int, batch: ObservedBatch, evidence: Evidence, seen: Sequence[int] | None) -> None:
        """Score a batch of the dataloader number ``place``."""
        scores, rows = self.scorer(evidence), self.rows[place]
        columns = rows.add(batch.inputs, batch.logits, batch.labels, scores, seen)
        if self.sources:
            scored = ScoredBatch(
                rows.dataset, **columns, inputs=batch.inputs, evidence=evidence, scores=scores
            ).without_repeats()
            for source in self.sources:
                source.add(scored)

    @property
    def names(self) -> list[str]:
        """The names of the data sets, in the order of the dataloaders."""
        return [rows.dataset for rows in self.rows]

    def kept(self) -> list[Any]:
        """What each picture source kept."""
        return [source.kept() for source in self.sources]

    def join(self, parts: Sequence[list[Any]]) -> None:
        """Pass to each picture source what all processes kept."""
        for number, source in enumerate(self.sources):
            source.join([part[number] for part in parts])

    def results(self) -> pa.Table:
        """The rows that this process has scored so far."""
        tables = [empty_results([score.name for score in self.scorer.scores])]
        for rows in self.rows:
            tables.append(rows.table())
        return merge_results(tables, self.names)

    def warn_of_empty(self, results: pa.Table, processes: Processes) -> None:
        """Warn of each data set without a sample."""
        present = set(results["dataset"].to_pylist())
        for name in self.names:
            if name not in present:
                processes.warn(f"the dataloader {name!r} returned no samples: it is not in the results")


@dataclass
class FitStage:
    """Fits scores.

    Args:
        fitting: Accumulates what they are fitted on.
        rows: Those of each dataloader, of which only the index is used.
        roles: The role of each data set by name, where scores are fitted on in- and out-of-distribution samples.
    """

    fitting: Fitting
    rows: Sequence[Rows]
    roles: Mapping[str, str] | None = None

    @property
    def scorer(self) -> Scorer:
        """Gathers what fitting needs."""
        return self.fitting.scorer

    def ood(self, place: int, size: int) -> Tensor | None:
        """Which samples are out-of-distribution ``(N,)``, by the role of the dataloader."""
        if self.roles is None:
            return None
        return torch.full((size,), self.roles[self.rows[place].dataset] != "id")

    def add(self, place: int, batch: ObservedBatch, evidence: Evidence, seen: Sequence[int] | None) -> None:
        """Accumulate a batch of the dataloader number ``place``."""
        index = self.rows[place].index.take(batch.size, seen)
        self.fitting.add(batch, evidence, index != REPEATED)

    def fitted(self, model: nn.Module, processes: Processes) -> dict[str, FittedScore]:
        """The fitted scores by name, from what all processes accumulated."""
        return self.fitting.finish(model, processes.all_gather(self.fitting.seen))


Stage = ScoreStage | FitStage
"""What a run does."""
