"""Collects the metrics of pixels and a few maps in bounded memory, and reads the rows of images and their segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from lightning_gradmetrics.pictures.base import Picture, ScoredBatch, images_of
from lightning_gradmetrics.pictures.pixels.levels import class_metrics, image_metrics, pixel_metrics, segment_metrics
from lightning_gradmetrics.pictures.pixels.maps import KeptMaps, figure_of, half, picture_of, write_maps
from lightning_gradmetrics.pictures.pixels.metrics import Meters, PixelMeter, joined, sampled_pixels
from lightning_gradmetrics.pictures.pixels.resampling import group_of
from lightning_gradmetrics.pictures.pixels.settings import Pixels
from lightning_gradmetrics.results.sample_index import REPEATED
from lightning_gradmetrics.results.segments import SEGMENT_COLUMNS, SEGMENT_PREFIX, segment_table
from lightning_gradmetrics.results.stores import Results, read_columns
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.logit_checks import OUTLIER

__all__ = ["PixelResults"]

Row = dict[str, Any]


class PixelResults:
    """Reads the batches of a segmentation model, and stores what the settings request; for other models it stays empty.

    Args:
        settings: What to store.

    Attributes:
        results: The results of the run, which contain the rows of the images and the lists of their segments.
    """

    def __init__(self, settings: Pixels) -> None:
        self.settings = settings
        self.results: Results = pa.table({})
        self.meters: Meters = {}
        self.maps: list[KeptMaps] = []
        self._scores: tuple[str, ...] = ()
        self._names: list[str] = []
        self._metrics: list[Row] | None = None
        self._seen = 0

    def look(self, evidence: Evidence) -> None:
        """Request nothing, because only scores are read."""

    def add(self, batch: ScoredBatch) -> None:
        """Read a batch; does nothing without maps of pixels."""
        if batch.maps is None or batch.evidence.given_logits.ndim != 4:
            return
        evidence = batch.evidence
        prediction = evidence.given_prediction
        labels, classes = evidence.given_labels, evidence.given_logits.shape[1]
        self._metrics, self._names = None, [self.settings.class_name(number, classes) for number in range(classes)]
        self._scores = tuple(batch.scores)
        for number, image in enumerate(batch.index.tolist()):
            if image == REPEATED:
                continue
            truth = None if labels is None else labels[number]
            maps = {name: values[number] for name, values in batch.maps.items()}
            self._add_metrics(batch.dataset, maps, prediction[number], truth, group_of(image, prediction[number]))
            self._keep_maps(batch, number, maps, prediction[number], truth)
            self._seen += 1

    def _add_metrics(
        self, dataset: str, maps: Mapping[str, Tensor], prediction: Tensor, labels: Tensor | None, group: int
    ) -> None:
        if labels is None:
            return
        truth, predicted = labels.flatten().cpu(), prediction.flatten().cpu()
        tasks = {"misclassification": (truth >= 0, predicted != truth)}
        if self.settings.ood_labels:
            tasks["ood"] = ((truth >= 0) | (truth == OUTLIER), truth == OUTLIER)
        for task, (known, target) in tasks.items():
            positions = sampled_pixels(known, self.settings.every)
            for score, values in maps.items():
                chosen = values.flatten().cpu()[positions]
                finite = chosen.isfinite()
                key = (dataset, task, score)
                if key not in self.meters:
                    self.meters[key] = PixelMeter(self.settings.bins, self.settings.resamples)
                self.meters[key].add(chosen[finite], target[positions][finite], predicted[positions][finite], group)

    def _keep_maps(
        self, batch: ScoredBatch, number: int, maps: Mapping[str, Tensor], prediction: Tensor, labels: Tensor | None
    ) -> None:
        first = next(iter(batch.scores))
        value = float(batch.scores[first][number])
        wanted = self.settings.maps
        if not wanted or (len(self.maps) == wanted and value <= self.maps[-1].value):
            return
        images = images_of(batch.inputs)
        picture = None if images is None else picture_of(images[number])
        halves = {name: half(values) for name, values in maps.items()}
        truth = None if labels is None else labels.cpu().numpy()
        index = int(batch.index[number])
        index = self._seen if index < 0 else index
        kept = KeptMaps(batch.dataset, index, value, prediction.cpu().numpy(), truth, halves, picture)
        self._take([*self.maps, kept])

    def _take(self, maps: Sequence[KeptMaps]) -> None:
        ordered = sorted(maps, key=lambda one: (-one.value, one.dataset, one.index))
        self.maps = ordered[: self.settings.maps]

    def kept(self) -> Any:
        """Return the data that processes exchange."""
        return self.meters, self.maps, (self._scores, self._names)

    def join(self, parts: Sequence[Any]) -> None:
        """Replace the data by the data of all processes."""
        self._metrics, maps = None, []
        meters: list[Meters] = []
        for measured, own, names in parts:
            meters.append(measured)
            maps += own
            if names[0]:
                self._scores, self._names = names
        self.meters = joined(meters)
        self._take(maps)

    def pictures(self) -> list[Picture]:
        """Return a picture of each image whose maps are kept."""
        pictures = []
        for maps in self.maps:
            name = f"maps/{maps.dataset}/{maps.index}"
            caption = "Scores by rank: every colour covers the same number of pixels. Ignored pixels are grey."
            pictures.append(Picture(name, f"{maps.dataset}, image {maps.index}", caption, figure_of(maps), "Maps"))
        return pictures

    def tables(self) -> dict[str, pa.Table]:
        """Return the tables ``segments``, ``pixel_metrics`` and ``class_metrics``, if there are any."""
        tables = {"segments": self.segments()}
        for name, rows in (("pixel_metrics", self.metrics()), ("class_metrics", self.by_class())):
            tables[name] = pa.Table.from_pylist(rows)
        return {name: table for name, table in tables.items() if table.num_rows}

    def segments(self) -> pa.Table:
        """Return one row per predicted segment."""
        return segment_table(read_columns(self.results), self.settings.class_names)

    def by_class(self) -> list[Row]:
        """Return one row per dataset, task, score and predicted class."""
        return list(class_metrics(self.meters, self._names))

    def metrics(self) -> list[Row]:
        """Return the metrics: one row per unit (pixel, image or segment), dataset, task, score, metric and kind of pooling."""
        if self._metrics is None:
            scores, resamples = self._scores, self.settings.resamples
            self._metrics = list(pixel_metrics(self.meters))
            if scores:
                images = read_columns(self.results, ["dataset", "error", "miou", *scores])
                self._metrics += image_metrics(images, scores, resamples)
            if scores and self.settings.segments:
                self._metrics += segment_metrics(self._segment_columns, scores, resamples)
        return self._metrics

    def _segment_columns(self, names: Sequence[str]) -> pa.Table:
        """Return some columns of the segments; segments of images with an unknown index have the number of their row."""
        lists = [SEGMENT_COLUMNS["segment"], SEGMENT_COLUMNS["class"]]
        for name in names:
            if name not in ("dataset", "index"):
                lists.append(SEGMENT_COLUMNS.get(name, f"{SEGMENT_PREFIX}{name}"))
        images = read_columns(self.results, ["dataset", "index", *lists])
        index = pc.coalesce(images["index"], pa.array(range(images.num_rows), pa.int64()))
        return segment_table(images.set_column(images.column_names.index("index"), "index", index))

    def logged(self, prefix: str) -> dict[str, float]:
        """Return the AUROC of pixels, pooled and within the predicted class, by logged name."""
        logged = {}
        for row in self.metrics():
            if row["unit"] == "pixel" and row["metric"] == "auroc" and row["within"] != "image":
                kind = "pixel" if row["within"] == "all" else "pixel_within_class"
                logged[f"{prefix}/{row['dataset']}/{row['task']}/{row['score']}/{kind}_auroc"] = row["value"]
        return logged

    def write_maps(self, directory: str | Path) -> list[Path]:
        """Write the kept maps, ``<dataset>_<index>.npz`` and a PNG each, and return the files."""
        paths: list[Path] = []
        for maps in self.maps:
            paths += write_maps(maps, Path(directory))
        return paths
