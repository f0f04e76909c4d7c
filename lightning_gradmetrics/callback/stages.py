"""The stages of a run: one scores the samples of each batch, the other fits scores on them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.callback.columns import Columns, column_values
from lightning_gradmetrics.callback.processes import Processes
from lightning_gradmetrics.callback.small_batches import SmallBatches, are_separable
from lightning_gradmetrics.callback.units import row_values
from lightning_gradmetrics.pictures import PictureSource, ScoredBatch
from lightning_gradmetrics.pictures.pixels.settings import Pixels
from lightning_gradmetrics.pictures.pixels.source import PixelResults
from lightning_gradmetrics.results.rows import Rows
from lightning_gradmetrics.results.sample_index import REPEATED, Indices
from lightning_gradmetrics.results.stores import Store
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
        sources: The picture sources, which also read the batches.
        columns: The functions of further columns, by name.
        store: Stores the rows.
        pixels: Collects the pixels of segmentation models; one of the sources.
    """

    scorer: Scorer
    rows: Sequence[Rows]
    store: Store
    sources: Sequence[PictureSource] = ()
    columns: Columns = field(default_factory=dict)
    pixels: PixelResults | None = None
    _small: list[SmallBatches] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        reads_batches = self.columns or len(self.sources) > (self.pixels is not None)
        is_plain = type(self.scorer) is Scorer  # the scorer of a sweep's job looks up the scores of each batch
        if reads_batches or not is_plain or not are_separable(self.scorer.scores):
            return
        for rows in self.rows:
            rows.unscored = small = SmallBatches(self.scorer, rows)
            self._small.append(small)

    def ood(self, place: int, size: int) -> Tensor | None:
        """Returns None: while scoring, roles are not used."""
        return None

    def skips(self, place: int, size: int | None, seen: Indices | None) -> bool:
        """Return whether an earlier run stored all rows of the next batch of dataloader number ``place``."""
        return size is not None and self.rows[place].index.skip(size, seen)

    def add(
        self,
        place: int,
        batch: ObservedBatch,
        evidence: Evidence,
        index: Tensor,
        ids: Sequence[str] = (),
    ) -> None:
        """Score a batch of the dataloader number ``place``."""
        rows = self.rows[place]
        if self._small and SmallBatches.accepts(batch, evidence):
            self._small[place].add(batch, evidence, index, ids)
        else:
            self._score(rows, batch, evidence, index, ids)
        self.store.after_batch(rows)

    def _score(self, rows: Rows, batch: ObservedBatch, evidence: Evidence, index: Tensor, ids: Sequence[str]) -> None:
        pixels = Pixels() if self.pixels is None else self.pixels.settings
        values = row_values(self.scorer, batch, evidence, pixels, list(self.columns))
        vectors = column_values(self.columns, evidence)
        columns = rows.add(
            index, batch.inputs, values.logits, values.labels, values.scores, vectors, ids, values.further
        )
        if not rows.are_texts:
            self._read(
                ScoredBatch(
                    rows.dataset,
                    **columns,
                    inputs=batch.inputs,
                    evidence=evidence,
                    scores=values.scores,
                    maps=values.maps,
                )
            )

    def settle(self) -> None:
        """Compute the scores of all batches."""
        for small in self._small:
            small.settle()

    def _read(self, scored: ScoredBatch) -> None:
        """Pass a batch to the picture sources."""
        if self.pixels is not None:
            self.pixels.add(scored)
        if len(self.sources) > (self.pixels is not None):
            scored = scored.without_repeats()
            for source in self.sources:
                if source is not self.pixels:
                    source.add(scored)

    @property
    def names(self) -> list[str]:
        """The names of the datasets, in the order of the dataloaders."""
        return [rows.dataset for rows in self.rows]

    def kept(self) -> list[Any]:
        """Return the retained data of each picture source."""
        return [source.kept() for source in self.sources]

    def join(self, parts: Sequence[list[Any]]) -> None:
        """Pass the retained data of all processes to each picture source."""
        for number, source in enumerate(self.sources):
            source.join([kept_of_process[number] for kept_of_process in parts])

    def note_missing(self, processes: Processes, skipped: Collection[str], selected: Collection[str]) -> None:
        """Warn about each dataset without a sample, and let the store expect that other datasets lack rows.

        Args:
            processes: The processes of the run.
            skipped: The datasets of which whole batches were left out.
            selected: The datasets of which samples were left out in other batches.
        """
        self.store.leave_out({*skipped, *selected})
        for rows in self.rows:
            if not rows.added and rows.index.committed is None and rows.dataset not in skipped:
                processes.warn(f"the dataloader {rows.dataset!r} returned no samples: it is not in the results")

    def close(self) -> None:
        """End the run of the store."""
        self.store.close()


@dataclass
class FitStage:
    """Fits scores.

    Args:
        fitting: Accumulates the data of the fit.
        rows: The rows of each dataloader, of which only the index is used.
        roles: The role of each dataset by name, if scores are fitted on both in- and out-of-distribution samples.
    """

    fitting: Fitting
    rows: Sequence[Rows]
    roles: Mapping[str, str] | None = None

    @property
    def scorer(self) -> Scorer:
        """The scorer that collects the evidence for the fit."""
        return self.fitting.scorer

    def ood(self, place: int, size: int) -> Tensor | None:
        """Return which samples are out-of-distribution ``(N,)``, by the role of the dataloader."""
        if self.roles is None:
            return None
        return torch.full((size,), self.roles[self.rows[place].dataset] != "id")

    def skips(self, place: int, size: int | None, seen: Indices | None) -> bool:
        """Returns False: every batch is fitted on."""
        return False

    def add(
        self,
        place: int,
        batch: ObservedBatch,
        evidence: Evidence,
        index: Tensor,
        ids: Sequence[str] = (),
    ) -> None:
        """Accumulate a batch of the dataloader number ``place``."""
        self.fitting.add(batch, evidence, index != REPEATED)

    def settle(self) -> None:
        """Do nothing: every batch is accumulated at once."""

    def fitted(self, model: nn.Module, processes: Processes) -> dict[str, FittedScore]:
        """Return the fitted scores by name, from the accumulated data of all processes."""
        return self.fitting.finish(model, processes.all_gather(self.fitting.seen))

    def close(self) -> None:
        """Do nothing: the totals belong to the stage."""


Stage = ScoreStage | FitStage
"""The stage of a run."""
