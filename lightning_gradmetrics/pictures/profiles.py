"""The gradient norm of every layer over each data set of a run: its median and quartiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import torch
from torch import Tensor

from lightning_gradmetrics.gradients.objectives import Objective
from lightning_gradmetrics.pictures.base import Picture, ScoredBatch
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.layer_profile import LayerNorms, Profile
from lightning_gradmetrics.scoring.totals import row_keys

__all__ = ["ProfileGallery"]

MOST = 5000
"""Samples of a data set that the quartiles are of: a uniform sample of all that were seen."""

QUARTILES = {"lower_quartile": 0.25, "median": 0.5, "upper_quartile": 0.75}


@dataclass
class _Sample:
    """A uniform sample of one data set's norms: those with the smallest keys, which are made of the samples' indices."""

    count: int
    keys: Tensor
    norms: Tensor


def _joined(parts: Sequence[_Sample]) -> _Sample:
    keys, norms = torch.cat([part.keys for part in parts]), torch.cat([part.norms for part in parts])
    order = keys.argsort(stable=True)[:MOST]
    return _Sample(sum(part.count for part in parts), keys[order], norms[order])


@dataclass
class ProfileGallery:
    """The profile of each data set, of a bounded sample of it.

    Args:
        profile: What it is of.
    """

    profile: Profile
    layers: tuple[str, ...] = ()
    seen: dict[str, _Sample] = field(default_factory=dict)

    def look(self, evidence: Evidence) -> LayerNorms:
        """The norms."""
        return self.profile(evidence)

    def add(self, batch: ScoredBatch) -> None:
        """Look at a batch; samples with NaN or Inf are left out."""
        self.layers, norms = self.look(batch.evidence)
        keep = batch.finite.cpu() & norms.isfinite().all(1).cpu()
        if keep.any():
            found = _Sample(int(keep.sum()), row_keys(batch.index[:, None])[keep], norms.detach().float().cpu()[keep])
            before = [self.seen[batch.dataset]] if batch.dataset in self.seen else []
            self.seen[batch.dataset] = _joined([*before, found])

    def kept(self) -> tuple[tuple[str, ...], dict[str, _Sample]]:
        """The layers, and the sample of each data set."""
        return self.layers, self.seen

    def join(self, parts: Sequence[tuple[tuple[str, ...], dict[str, _Sample]]]) -> None:
        """The samples of all processes."""
        self.layers = max((layers for layers, _ in parts), key=len)
        names = dict.fromkeys(name for _, seen in parts for name in seen)
        self.seen = {name: _joined([seen[name] for _, seen in parts if name in seen]) for name in names}

    def quartiles(self) -> dict[str, Tensor]:
        """Lower quartile, median and upper quartile of every layer's norm, ``(3, L)``, by data set."""
        wanted = torch.tensor(list(QUARTILES.values()))
        return {name: sample.norms.quantile(wanted, dim=0) for name, sample in self.seen.items()}

    def tables(self) -> dict[str, pa.Table]:
        """``profile``: a row a data set and layer."""
        columns: dict[str, list[object]] = {"dataset": [], "layer": [], "samples": []}
        numbers = self.quartiles()
        for name, sample in self.seen.items():
            columns["dataset"] += [name] * len(self.layers)
            columns["layer"] += self.layers
            columns["samples"] += [sample.count] * len(self.layers)
        for place, key in enumerate(QUARTILES):
            columns[key] = [value for found in numbers.values() for value in found[place].tolist()]
        return {"profile": pa.table(columns)} if self.seen else {}

    def pictures(self) -> list[Picture]:
        """The profiles of all data sets in one figure."""
        if not self.seen:
            return []
        from lightning_gradmetrics.pictures.figures import profile_figure

        objective = Objective.of(self.profile.objective).name
        figure = profile_figure(self.quartiles(), self.layers, f"{self.profile.norm:g}-norm of the gradient")
        most = max(sample.count for sample in self.seen.values())
        sampled = f" Of a data set with more, {MOST} samples are taken at random." if most > MOST else ""
        caption = (
            f"The {self.profile.norm:g}-norm of the gradient of the objective {objective} over the parameters of each "
            "layer, from the input to the output: the line is the median over a data set's samples, the band goes from "
            "the lower to the upper quartile. Layers with more parameters have larger norms at equally large entries: "
            f"compare the data sets within a layer.{sampled}"
        )
        return [Picture("profile", "Gradient norm of every layer", caption, figure, "Gradient norms by layer")]
