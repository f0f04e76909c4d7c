"""Collects the results of pixels in bounded memory: rows of images and segments, metrics, and maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from lightning_gradmetrics.pictures.base import Picture, ScoredBatch, images_of
from lightning_gradmetrics.pictures.pixels.images import columns_of
from lightning_gradmetrics.pictures.pixels.levels import class_metrics, image_metrics, pixel_metrics, segment_metrics
from lightning_gradmetrics.pictures.pixels.maps import KeptMaps, figure_of, half, picture_of, write_maps
from lightning_gradmetrics.pictures.pixels.metrics import Meters, PixelMeter, joined, sampled_pixels
from lightning_gradmetrics.pictures.pixels.resampling import group_of
from lightning_gradmetrics.pictures.pixels.segments import segments_of
from lightning_gradmetrics.pictures.pixels.settings import Pixels
from lightning_gradmetrics.results.sample_index import REPEATED
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.logit_checks import OUTLIER

__all__ = ["PixelResults"]

Row = dict[str, Any]


class PixelResults:
    """Reads the batches of a segmentation model, and stores what the settings request; for other models it stays empty.

    Args:
        settings: What to store.
    """

    def __init__(self, settings: Pixels) -> None:
        self.settings = settings
        self.images: list[Row] = []
        self.segments: list[Row] = []
        self.meters: Meters = {}
        self.maps: list[KeptMaps] = []
        self._scores: tuple[str, ...] = ()
        self._names: list[str] = []
        self._metrics: list[Row] | None = None

    def look(self, evidence: Evidence) -> None:
        """Request nothing, because only scores are read."""

    def add(self, batch: ScoredBatch) -> None:
        """Read a batch; does nothing without maps of pixels."""
        if batch.maps is None or batch.evidence.given_logits.ndim != 4:
            return
        evidence = batch.evidence
        prediction = evidence.given_logits.argmax(1)
        labels, classes = evidence.given_labels, evidence.given_logits.shape[1]
        columns = columns_of(batch.maps, prediction, labels, classes, self.settings.aggregates)
        self._metrics, self._names = None, [self.settings.class_name(number, classes) for number in range(classes)]
        index, self._scores = batch.index.tolist(), tuple(batch.scores)
        for number, image in enumerate(index):
            if image == REPEATED:
                continue
            row: Row = {"dataset": batch.dataset, "index": image if image >= 0 else None}
            for name, values in {**columns, **batch.scores}.items():
                row[name] = values[number].item()
            self.images.append(row)
            truth, group = None if labels is None else labels[number], group_of(image, prediction[number])
            one = {name: values[number] for name, values in batch.maps.items()}
            self._add_metrics(batch.dataset, one, prediction[number], truth, group)
            self._add_segments(row, one, prediction[number], truth, group)
            self._keep_maps(row, batch, number, one, prediction[number], truth)

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
            places = sampled_pixels(known, self.settings.every)
            for score, values in maps.items():
                chosen = values.flatten().cpu()[places]
                finite = chosen.isfinite()
                key = (dataset, task, score)
                if key not in self.meters:
                    self.meters[key] = PixelMeter(self.settings.bins, self.settings.resamples)
                self.meters[key].add(chosen[finite], target[places][finite], predicted[places][finite], group)

    def _add_segments(
        self, row: Row, maps: Mapping[str, Tensor], prediction: Tensor, labels: Tensor | None, group: int
    ) -> None:
        if not self.settings.segments:
            return
        arrays = {}
        for name, values in maps.items():
            arrays[name] = values.double().cpu().numpy()
        truth = None if labels is None else labels.cpu().numpy()
        start = {"dataset": row["dataset"], "index": row["index"], "group": group}
        for segment in segments_of(prediction.cpu().numpy(), truth, arrays, self.settings.segments):
            self.segments.append({**start, **segment, "class_name": self._names[segment["class"]]})

    def _keep_maps(
        self,
        row: Row,
        batch: ScoredBatch,
        number: int,
        maps: Mapping[str, Tensor],
        prediction: Tensor,
        labels: Tensor | None,
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
        index = len(self.images) - 1 if row["index"] is None else int(row["index"])
        kept = KeptMaps(batch.dataset, index, value, prediction.cpu().numpy(), truth, halves, picture)
        self._take([*self.maps, kept])

    def _take(self, maps: Sequence[KeptMaps]) -> None:
        ordered = sorted(maps, key=lambda one: (-one.value, one.dataset, one.index))
        self.maps = ordered[: self.settings.maps]

    def kept(self) -> Any:
        """Return the data that processes exchange."""
        return self.images, self.segments, self.meters, self.maps, (self._scores, self._names)

    def join(self, parts: Sequence[Any]) -> None:
        """Replace the data by the data of all processes."""
        self._metrics = None
        self.images, self.segments, maps = [], [], []
        meters: list[Meters] = []
        for images, segments, measured, own, names in parts:
            self.images += images
            self.segments += segments
            meters.append(measured)
            maps += own
            if names[0]:
                self._scores, self._names = names
        self.images.sort(key=_place)
        self.segments.sort(key=_place)
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
        """Return the tables ``images``, ``segments``, ``pixel_metrics`` and ``class_metrics``, if there are any."""
        tables = {}
        by_class = list(class_metrics(self.meters, self._names))
        found = {
            "images": self.images,
            "segments": self.segments,
            "pixel_metrics": self.metrics(),
            "class_metrics": by_class,
        }
        for name, rows in found.items():
            if rows:
                tables[name] = pa.Table.from_pylist(rows)
        if "segments" in tables:
            tables["segments"] = tables["segments"].drop_columns(["group"])
        return tables

    def metrics(self) -> list[Row]:
        """Return the metrics: one row per unit (pixel, image or segment), dataset, task, score, metric and kind of pooling."""
        if self._metrics is None:
            scores, resamples = self._scores, self.settings.resamples
            self._metrics = [
                *pixel_metrics(self.meters),
                *image_metrics(self.images, scores, resamples),
                *segment_metrics(self.segments, scores, resamples),
            ]
        return self._metrics

    def logged(self, prefix: str) -> dict[str, float]:
        """Return the AUROC of pixels, pooled and within the predicted class, by logged name."""
        logged = {}
        for row in self.metrics():
            if row["unit"] == "pixel" and row["metric"] == "auroc" and row["within"] != "image":
                kind = "pixel" if row["within"] == "all" else "pixel_within_class"
                logged[f"{prefix}/{row['dataset']}/{row['task']}/{row['score']}/{kind}_auroc"] = row["value"]
        return logged

    def with_images(self, results: pa.Table) -> pa.Table:
        """Return the results with the columns of the images, matched by dataset and index; unchanged if that fails.

        Args:
            results: One row per image.
        """
        by_key = {(row["dataset"], row["index"]): row for row in self.images}
        if (
            not self.images
            or "error" in results.column_names
            or len(by_key) != results.num_rows
            or len(self.images) != results.num_rows
        ):
            return results
        rows = []
        for dataset, index in zip(results["dataset"].to_pylist(), results["index"].to_pylist(), strict=True):
            if (dataset, index) not in by_key:
                return results
            rows.append(by_key[dataset, index])
        added = pa.Table.from_pylist(rows).drop_columns(["dataset", "index", *self._scores])
        for name in added.column_names:
            results = results.append_column(name, added[name])
        return results

    def write_maps(self, directory: str | Path) -> list[Path]:
        """Write the kept maps, ``<dataset>_<index>.npz`` and a PNG each, and return the files."""
        paths: list[Path] = []
        for maps in self.maps:
            paths += write_maps(maps, Path(directory))
        return paths


def _place(row: Row) -> tuple[str, int]:
    """Return the sort key of an image; sorting makes results independent of the number of processes."""
    return row["dataset"], -1 if row["index"] is None else row["index"]
