"""Scores on Spark, as a function for ``pyspark.ml.functions.predict_batch_udf``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_gradmetrics import scores as _registered  # noqa: F401  # registers the names of the scores
from lightning_gradmetrics.scoring.arrays import ArrayScorer
from lightning_gradmetrics.scoring.registry import ScoreLike

__all__ = ["make_predict"]

Predict = Callable[..., Mapping[str, Any]]


def make_predict(
    make_model: Callable[[], nn.Module],
    scores: ScoreLike | Iterable[ScoreLike] | Mapping[str, ScoreLike],
    columns: Sequence[str] | None = None,
    **options: Any,
) -> Callable[[], Predict]:
    """Return the argument for Spark's ``predict_batch_udf``; each Python worker loads the model once.

    ``predict_batch_udf(make_predict(make_model, ["gradnorm"]), return_type=StructType().add("prediction",
    "long").add("gradnorm", "double"), batch_size=256, input_tensor_shapes=[[3, 32, 32]])``

    Args:
        make_model: Returns the model.
        scores: As in :func:`lightning_gradmetrics.score`.
        columns: The columns of the result, in the order of ``return_type``; by default ``prediction`` and the scores.
        options: ``device``, ``head``, ``logits_fn`` and ``engine``, as in :func:`lightning_gradmetrics.score`.

    Returns:
        A function that loads the model and returns the function from input arrays ``(N, ...)`` to columns ``(N,)``.

    Example:
        >>> predict = make_predict(lambda: nn.Linear(2, 3), ["entropy"])()
        >>> list(predict(np.ones((4, 2), np.float32)))
        ['prediction', 'entropy']
    """
    return partial(_load, make_model, scores, columns, options)


def _load(make_model: Any, scores: Any, columns: Sequence[str] | None, options: Mapping[str, Any]) -> Predict:
    scorer = ArrayScorer(make_model, scores, **options)
    names = list(columns or ["prediction", *(score.name for score in scorer.scorer.scores)])

    def predict(*arrays: np.ndarray[Any, Any]) -> dict[str, Any]:
        tensors = tuple(map(torch.as_tensor, map(np.array, arrays)))
        columns = scorer(tensors[0] if len(tensors) == 1 else tensors)
        return dict(zip(names, map(columns.__getitem__, names), strict=True))

    return predict
