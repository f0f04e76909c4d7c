"""The leaderboard files of a language model's tokens and texts, and of a segmentation model's pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lightning_gradmetrics.callback import GradientMetrics
from lightning_gradmetrics.cli.leaderboard_record import areas_of, base_record, cost_of
from lightning_gradmetrics.cli.stories import KINDS, score_names
from lightning_gradmetrics.evaluation import evaluate
from lightning_gradmetrics.pictures.pixels.levels import labelled_pixels
from lightning_gradmetrics.scoring.registry import make

__all__ = ["segmentation_record", "stories_record"]

Record = dict[str, Any]

RESAMPLES = 1000

OF_WHOLE_ANSWERS = {"family": "gradient", "forwards": 2, "backward": True}
"""The cost of ``semgrad`` and ``hybridgrad``, which are not scores of a batch: the pass of the text and that of the prompt."""


def stories_record(options: Mapping[str, Any], tokens: pa.Table, texts: pa.Table) -> Record:
    """Return the leaderboard file of a language model: wrong next tokens, and texts of other kinds.

    A score of tokens is averaged over a text. Intervals resample texts.

    Args:
        options: The settings of ``leaderboard``.
        tokens: The result of :func:`~lightning_gradmetrics.cli.stories.token_table`.
        texts: The result of :func:`~lightning_gradmetrics.cli.stories.sequence_table`.
    """
    inside = next(iter(KINDS))
    own = tokens.filter(pc.equal(tokens["dataset"], inside))
    errors = evaluate(own, score_names(own), {inside: "id"}, resamples=RESAMPLES, cluster="text")
    kinds = evaluate(texts, score_names(texts), KINDS, resamples=RESAMPLES)
    rows = []
    for column in dict.fromkeys([*score_names(own), *map(_of_text, score_names(texts))]):
        areas = areas_of(errors, column) if column in own.column_names else {}
        for name in (column, f"mean {column}"):
            if name in texts.column_names:
                areas |= areas_of(kinds, name)
        if areas:
            rows.append({**_cost(column), "fit": "", **areas})
    datasets = []
    for dataset in kinds.datasets:
        accuracy = errors.datasets[0]["accuracy"] if dataset["name"] == inside else None
        datasets.append({"name": dataset["name"], "role": dataset["role"], "rows": dataset["rows"], "unit": "texts"})
        datasets[-1]["accuracy"] = accuracy
    record = base_record(options, {"name": "language model"})
    return {**record, "datasets": datasets, "resamples": RESAMPLES, "seed": 0, "rows": rows}


def _of_text(column: str) -> str:
    """Return the score whose mean or maximum over a text a column has."""
    return column.removeprefix("mean ").removeprefix("max ")


def _cost(column: str) -> Record:
    name = column.removesuffix("/gradient")
    if name.startswith(("semgrad", "hybridgrad")):
        return {"score": column, "spelled": column, **OF_WHOLE_ANSWERS}
    return {**cost_of(make(name)), "score": column, "spelled": column}


def segmentation_record(options: Mapping[str, Any], callback: GradientMetrics, name: str, resamples: int) -> Record:
    """Return the leaderboard file of a segmentation model: wrong pixels, with intervals over images.

    Args:
        options: The settings of ``leaderboard``.
        callback: After the run.
        name: The name of the model.
        resamples: The number of bootstrap resamples.
    """
    areas = {}
    for row in callback.pixel_metrics.to_pylist():
        if (row["unit"], row["task"], row["metric"], row["within"]) == ("pixel", "misclassification", "auroc", "all"):
            areas[row["score"]] = [row["value"], row["low"], row["high"]]
    rows = []
    for score in callback.scorer.scores:
        rows.append({**cost_of(score), "fit": "", "errors": areas[score.name]})
    pixels, accuracy = labelled_pixels(callback.results)
    images = f"pixels of {callback.results.num_rows} images"
    dataset = {"name": "images", "role": "id", "rows": pixels, "unit": images, "accuracy": accuracy}
    record = base_record(options, {"name": name})
    return {**record, "datasets": [dataset], "resamples": resamples, "seed": 0, "rows": rows}
