"""A class for ``ray.data.Dataset.map_batches``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from lightning_gradmetrics import scores as _registered  # noqa: F401  # registers the names of the scores
from lightning_gradmetrics.classifier.forward import Inputs
from lightning_gradmetrics.ray.arrow import to_array
from lightning_gradmetrics.ray.spark import make_predict
from lightning_gradmetrics.scoring.arrays import ArrayScorer
from lightning_gradmetrics.scoring.registry import ScoreLike

__all__ = ["Scorer"]

Batch = Mapping[str, Any]


class Scorer:
    """Adds prediction and scores to batches: a class for ``ray.data.Dataset.map_batches``, one model per actor.

    ``dataset.map_batches(lgm.ray.Scorer, fn_constructor_args=[make_model, ["gradnorm"]], batch_size=256,
    batch_format="pyarrow", concurrency=4, num_gpus=1)``

    Args:
        make_model: Returns the model; each actor calls it once.
        scores: As in :func:`lightning_gradmetrics.score`.
        inputs: The column with the model's inputs, or several columns, passed in that order; or a function from a batch
            (a mapping from column name to array) to the model's inputs.
        labels: The column with the true labels, for scores that need them.
        drop: Columns to leave out of the result; by default the input columns. All others, such as an id, are kept.
        options: ``device``, ``head``, ``logits_fn`` and ``engine``, as in :func:`lightning_gradmetrics.score`.

    Raises:
        TypeError: If ``make_model`` is not callable, or does not return a module.
        ValueError: If a score is unknown or not fitted for the model.

    Example:
        >>> scorer = Scorer(lambda: nn.Linear(2, 3), ["entropy"], inputs="x")
        >>> batch = pa.table({"id": ["a", "b"], "x": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2))})
        >>> scorer(batch).column_names
        ['id', 'prediction', 'entropy', 'finite']
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        scores: ScoreLike | Iterable[ScoreLike] | Mapping[str, ScoreLike],
        *,
        inputs: str | Sequence[str] | Callable[[Batch], Inputs] = "data",
        labels: str | None = None,
        drop: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        self._scorer = ArrayScorer(make_model, scores, **options)
        self._columns: list[str] = []
        self._inputs = inputs if callable(inputs) else None
        if not callable(inputs):
            self._columns = [inputs] if isinstance(inputs, str) else list(inputs)
        self._labels = labels
        self._drop = set(self._columns if drop is None else drop)

    for_spark = staticmethod(make_predict)
    """The same factory for Spark's ``predict_batch_udf``: ``Scorer.for_spark(make_model, ["gradnorm"])``."""

    def __call__(self, batch: pa.Table | Mapping[str, Any]) -> pa.Table | dict[str, Any]:
        """Return the batch with the columns ``prediction``, one per score, and ``finite``.

        Args:
            batch: An Arrow table, or a mapping from column name to array ``(N, ...)``.

        Raises:
            KeyError: If a column is missing.
            ValueError: If the batch already has a column with the name of a new one.
        """
        names = batch.column_names if isinstance(batch, pa.Table) else list(batch)
        arrays = _Columns(batch)
        labels = None if self._labels is None else torch.as_tensor(np.asarray(arrays[self._labels]))
        new = self._scorer(self._model_inputs(arrays), labels)
        retained = list(filter(self._is_kept, names))
        for name in new:
            if name in retained:
                raise ValueError(f"the batch already has a column {name!r}: rename it, or add it to drop=")
        if not isinstance(batch, pa.Table):
            return {**dict(zip(retained, map(batch.__getitem__, retained), strict=True)), **new}
        table = batch.select(retained)
        for name, values in new.items():
            table = table.append_column(name, pa.array(values))
        return table

    def _is_kept(self, name: str) -> bool:
        return name not in self._drop

    def _model_inputs(self, arrays: Mapping[str, Any]) -> Inputs:
        if self._inputs is not None:
            return self._inputs(arrays)
        tensors: list[Tensor] = []
        for name in self._columns:
            tensors.append(torch.as_tensor(np.array(arrays[name])))
        return tensors[0] if len(tensors) == 1 else tuple(tensors)


class _Columns(Mapping[str, Any]):
    """The columns of a batch as arrays, converted when they are read."""

    def __init__(self, batch: pa.Table | Mapping[str, Any]) -> None:
        self._batch = batch
        self._names = batch.column_names if isinstance(batch, pa.Table) else list(batch)

    def __getitem__(self, name: str) -> Any:
        """Return a column ``(N, ...)``.

        Raises:
            KeyError: If there is no such column.
        """
        if name not in self._names:
            raise KeyError(f"the batch has no column {name!r}; columns: {', '.join(self._names)}")
        column = self._batch[name]
        return to_array(column) if isinstance(column, (pa.Array, pa.ChunkedArray)) else column

    def __iter__(self) -> Any:
        """Iterate over the names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of columns."""
        return len(self._names)
