"""What a run does with each batch, and at its end: score the samples, or fit scores on them.

Both stages have a ``scorer``, which says what is needed of a batch; ``outside`` and ``add``, which take a batch of the
dataloader number ``place``; and an end of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from lightning_gradmetrics.callback.processes import Processes
from lightning_gradmetrics.classifier.forward import Inputs, batch_size
from lightning_gradmetrics.pictures import PictureSource, ScoredBatch
from lightning_gradmetrics.results.table import Rows, empty_results, merge_results
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
        sources: Look at the batches too, and make pictures.
    """

    scorer: Scorer
    rows: Sequence[Rows]
    sources: Sequence[PictureSource] = ()

    def outside(self, place: int, size: int) -> Tensor | None:
        """Scoring does not know."""
        return None

    def add(self, place: int, inputs: Inputs, labels: Tensor | None, evidence: Evidence) -> None:
        """Score a batch."""
        scores, rows = self.scorer(evidence), self.rows[place]
        columns = rows.add(inputs, evidence.given_logits, labels, scores)
        if self.sources:
            batch = ScoredBatch(rows.dataset, **columns, inputs=inputs, evidence=evidence, scores=scores).once()
            for source in self.sources:
                source.add(batch)

    @property
    def names(self) -> list[str]:
        """The data sets' names, in the order of the dataloaders."""
        return [rows.dataset for rows in self.rows]

    def kept(self) -> list[Any]:
        """What each picture source kept."""
        return [source.kept() for source in self.sources]

    def join(self, parts: Sequence[list[Any]]) -> None:
        """Give each picture source what all processes kept."""
        for number, source in enumerate(self.sources):
            source.join([part[number] for part in parts])

    def results(self, processes: Processes) -> pa.Table:
        """This process's results; a data set without a sample is warned of."""
        tables = [rows.table() for rows in self.rows]
        for name, table in zip(self.names, tables, strict=True):
            if not table.num_rows:
                processes.warn(f"the dataloader {name!r} gave no samples: it is not in the results")
        return merge_results(tables or [empty_results([s.name for s in self.scorer.scores])], self.names)


@dataclass
class FitStage:
    """Fits scores.

    Args:
        fitting: Accumulates what they are fitted on.
        rows: Of each dataloader: they tell which samples a distributed sampler repeats.
        roles: The role of each data set by name, where scores are fitted on in- and out-of-distribution samples.
    """

    fitting: Fitting
    rows: Sequence[Rows]
    roles: Mapping[str, str] | None = None

    @property
    def scorer(self) -> Scorer:
        """Gathers what fitting needs."""
        return self.fitting.scorer

    def outside(self, place: int, size: int) -> Tensor | None:
        """By the dataloader's role."""
        if self.roles is None:
            return None
        return torch.full((size,), self.roles[self.rows[place].dataset] != "id")

    def add(self, place: int, inputs: Inputs, labels: Tensor | None, evidence: Evidence) -> None:
        """Accumulate a batch."""
        self.fitting.add(inputs, evidence, self.rows[place].advance(batch_size(inputs)) >= 0)

    def finish(self, scorer: Scorer, model: nn.Module, processes: Processes) -> None:
        """Join what all processes accumulated, and put the fitted scores in the place of those that were not."""
        fitted = self.fitting.finish(model, processes.all_gather(self.fitting.seen))
        scorer.scores = tuple(fitted.get(score.name, score) for score in scorer.scores)
        scorer.head = scorer.head or self.scorer.head


Stage = ScoreStage | FitStage
"""What a run does."""
