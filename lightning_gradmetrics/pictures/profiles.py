"""Median and quartiles of each layer's gradient norm over each dataset of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce

import pyarrow as pa
import torch
from torch import Tensor

from lightning_gradmetrics.gradients.objectives import Objective
from lightning_gradmetrics.pictures.base import Picture, ScoredBatch, grouped
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.layer_profile import LayerNorms, Profile
from lightning_gradmetrics.scoring.totals import row_keys

__all__ = ["ProfileGallery"]

MAX_SAMPLES = 5000
"""Largest number of samples that the quartiles of a dataset use; larger datasets are sampled uniformly."""

QUARTILES = {"lower_quartile": 0.25, "median": 0.5, "upper_quartile": 0.75}


@dataclass
class _Sample:
    """A uniform sample of one dataset's norms: the rows with the smallest keys, which are hashes of their indices."""

    count: int
    keys: Tensor
    norms: Tensor

    def smallest_keys(self) -> _Sample:
        """Return the rows with the smallest keys, at most :data:`MAX_SAMPLES`."""
        order = self.keys.argsort(stable=True)[:MAX_SAMPLES]
        return _Sample(self.count, self.keys[order], self.norms[order])


def _merge(one: _Sample, other: _Sample) -> _Sample:
    """Return a uniform sample of both datasets' rows."""
    keys, norms = torch.cat([one.keys, other.keys]), torch.cat([one.norms, other.norms])
    return _Sample(one.count + other.count, keys, norms).smallest_keys()


@dataclass
class ProfileGallery:
    """The layer profile of each dataset, from a bounded sample of it.

    Args:
        profile: The objective and the norm.
    """

    profile: Profile
    layers: tuple[str, ...] = ()
    seen: dict[str, _Sample] = field(default_factory=dict)

    def look(self, evidence: Evidence) -> LayerNorms:
        """Return the norms of every layer."""
        return self.profile(evidence)

    def add(self, batch: ScoredBatch) -> None:
        """Read a batch; samples with NaN or Inf are left out."""
        self.layers, norms = self.look(batch.evidence)
        keep = batch.finite.cpu() & norms.isfinite().all(1).cpu()
        if not keep.any():
            return
        keys = row_keys(batch.index[:, None])[keep]
        sample = _Sample(int(keep.sum()), keys, norms.detach().float().cpu()[keep])
        if batch.dataset in self.seen:
            sample = _merge(self.seen[batch.dataset], sample)
        self.seen[batch.dataset] = sample.smallest_keys()

    def kept(self) -> tuple[tuple[str, ...], dict[str, _Sample]]:
        """Return the layers, and the sample of each dataset."""
        return self.layers, self.seen

    def join(self, parts: Sequence[tuple[tuple[str, ...], dict[str, _Sample]]]) -> None:
        """Merge the samples of all processes."""
        samples_of_processes = []
        for layers, samples in parts:
            samples_of_processes.append(samples)
            if len(layers) > len(self.layers):
                self.layers = layers
        self.seen = {}
        for name, samples_of_name in grouped(samples_of_processes).items():
            self.seen[name] = reduce(_merge, samples_of_name)

    def quartiles(self) -> dict[str, Tensor]:
        """Return lower quartile, median and upper quartile of every layer's norm ``(3, L)``, by dataset."""
        levels = torch.tensor(list(QUARTILES.values()))
        return {name: sample.norms.quantile(levels, dim=0) for name, sample in self.seen.items()}

    def tables(self) -> dict[str, pa.Table]:
        """Return ``profile``: one row per dataset and layer."""
        if not self.seen:
            return {}
        columns: dict[str, list[object]] = {"dataset": [], "layer": [], "samples": []}
        for name, sample in self.seen.items():
            columns["dataset"] += [name] * len(self.layers)
            columns["layer"] += self.layers
            columns["samples"] += [sample.count] * len(self.layers)
        table = torch.cat(list(self.quartiles().values()), dim=1)
        for key, values in zip(QUARTILES, table, strict=True):
            columns[key] = values.tolist()
        return {"profile": pa.table(columns)}

    def pictures(self) -> list[Picture]:
        """Return one figure with the profiles of all datasets."""
        if not self.seen:
            return []
        from lightning_gradmetrics.pictures.figures import profile_figure

        objective = Objective.of(self.profile.objective).name
        figure = profile_figure(self.quartiles(), self.layers, f"{self.profile.norm:g}-norm of the gradient")
        largest_count = max(sample.count for sample in self.seen.values())
        sampled = f" Larger datasets: {MAX_SAMPLES} random samples." if largest_count > MAX_SAMPLES else ""
        caption = (
            f"The {self.profile.norm:g}-norm of each layer's gradient of the objective {objective}, from the input to the "
            "output. Line: median over the samples of a dataset; band: from the lower to the upper quartile. A layer with "
            "more parameters has a larger norm if its entries are equally large, so compare datasets within a layer."
            f"{sampled}"
        )
        return [Picture("profile", "Gradient norm of every layer", caption, figure, "Gradient norms by layer")]
