"""The per-sample results: one row a sample, in a pyarrow table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from lightning_gradmetrics.classifier.forward import Inputs, batch_size, tensors_in

__all__ = [
    "Rows",
    "empty_results",
    "finite_rows",
    "join_scores",
    "largest",
    "largest_of_each",
    "merge_results",
    "sample_indices",
    "with_scores",
]


def finite_rows(inputs: Inputs, others: Iterable[Tensor]) -> Tensor:
    """Which samples are free of NaN and Inf, in their inputs and in ``others``: ``(N,)``, bool."""
    size = batch_size(inputs)
    checked = [t for t in (*tensors_in(inputs), *others) if t.is_floating_point() and t.ndim and len(t) == size]
    flags = [t.detach().isfinite().reshape(size, -1).all(1) for t in checked]
    return torch.stack(flags).all(0) if flags else torch.ones(size, dtype=torch.bool)


def sample_indices(loader: Any, rank: int = 0, world_size: int = 1) -> list[int] | None:
    """The data set's index of each row that this process will see, in order; ``None`` where it cannot be known beforehand.

    A distributed sampler repeats rows so that all processes see equally many: a repeated row has the index ``-1``.
    """
    if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
        return None
    sampler = _sampler(loader)
    if isinstance(sampler, SequentialSampler):
        return list(range(len(sampler)))
    # Lightning wraps the user's own sampler; only a sequential one gives the same order when it is asked twice.
    wrapped = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    if isinstance(sampler, DistributedSampler) and (wrapped is None or isinstance(wrapped, SequentialSampler)):
        size = len(sampler.dataset)  # type: ignore[arg-type]
        return [index if rank + row * world_size < size else -1 for row, index in enumerate(sampler)]
    return None


def _sampler(loader: DataLoader[Any]) -> Any:
    """The sampler whose order the loader follows; ``None`` behind a batch sampler of the user's own, which may follow another."""
    batches = getattr(loader.batch_sampler, "_batch_sampler", loader.batch_sampler)
    if batches is None:
        return loader.sampler
    return batches.sampler if type(batches) is BatchSampler else None


@dataclass
class Rows:
    """The rows of one data set as they come in, kept on the device until they are asked for.

    Args:
        dataset: The data set's name.
        scores: The names of the score columns.
        indices: The data set's index of each row, or ``None``.
        stride: Distance between the positions of two rows of this process, where ``indices`` is ``None``.
        offset: Position of this process's first row, likewise.
    """

    dataset: str
    scores: Sequence[str]
    indices: list[int] | None = None
    stride: int = 1
    offset: int = 0
    batches: list[dict[str, Tensor]] = field(default_factory=list)
    position: int = 0

    def advance(self, count: int) -> Tensor:
        """The indices of the next ``count`` rows ``(count,)``, -1 where a distributed sampler repeats one; moves on by as many."""
        start, self.position = self.position, self.position + count
        if self.indices is None:
            return self.offset + self.stride * torch.arange(start, self.position)
        return torch.tensor(self.indices[start : self.position])

    def add(
        self, inputs: Inputs, logits: Tensor, labels: Tensor | None, scores: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Add a batch, and give its columns: ``index``, ``prediction``, ``label`` and ``finite``, ``(N,)`` each."""
        prediction, index = logits.argmax(1), self.advance(len(logits))
        known = torch.full_like(prediction, -1) if labels is None else labels.to(prediction)
        finite = finite_rows(inputs, (logits, *scores.values())).to(prediction.device)
        columns = {"index": index, "prediction": prediction, "label": known, "finite": finite}
        self.batches.append({**columns, **{f"score/{name}": values.detach() for name, values in scores.items()}})
        return columns

    def table(self) -> pa.Table:
        """The rows so far. Rows that a distributed sampler repeated are left out."""
        if not self.batches:
            return empty_results(self.scores)
        columns = {key: torch.cat([batch[key] for batch in self.batches]).cpu() for key in self.batches[0]}
        index, label = columns["index"].numpy(), columns["label"].numpy()
        arrays = [
            pa.array([self.dataset] * len(index), pa.string()),
            pa.array(index, pa.int64()),
            pa.array(columns["prediction"].numpy(), pa.int64()),
            pa.array(label, pa.int64(), mask=label < 0),
            *(pa.array(columns[f"score/{name}"].double().numpy(), pa.float64()) for name in self.scores),
            pa.array(columns["finite"].numpy(), pa.bool_()),
        ]
        return pa.table(arrays, schema=_schema(self.scores)).filter(pa.array(index >= 0))


def _schema(scores: Sequence[str]) -> pa.Schema:
    head = [("dataset", pa.string()), ("index", pa.int64()), ("prediction", pa.int64()), ("label", pa.int64())]
    return pa.schema([*head, *((name, pa.float64()) for name in scores), ("finite", pa.bool_())])


def empty_results(scores: Sequence[str]) -> pa.Table:
    """The results table with no rows."""
    return _schema(scores).empty_table()


def merge_results(tables: Sequence[pa.Table], datasets: Sequence[str]) -> pa.Table:
    """The tables of several processes or data sets as one, in the order of the data sets and of their indices."""
    merged = pa.concat_tables(tables)
    if not merged.num_rows:
        return merged
    position = {name: i for i, name in enumerate(datasets)}
    order = pa.array([position[name] for name in merged.column("dataset").to_pylist()])
    ordered = merged.append_column("_order", order).sort_by([("_order", "ascending"), ("index", "ascending")])
    return ordered.drop_columns(["_order"])


KEYS = ("dataset", "index", "prediction", "label")


def with_scores(results: pa.Table, columns: Mapping[str, Tensor]) -> pa.Table:
    """The table with further scores ``(N,)`` before ``finite``, which is false where one of them is not.

    Args:
        results: A results table.
        columns: The scores by name, in the order of its rows.

    Raises:
        ValueError: If the table has a column of that name.
    """
    for name, values in columns.items():
        if name in results.column_names:
            raise ValueError(f"the results have a column {name!r} already: give the score another name")
        values = values.detach().cpu().double()
        finite = pc.and_(results["finite"], pa.array(values.isfinite().numpy()))
        results = results.drop_columns(["finite"]).append_column(name, pa.array(values.numpy()))
        results = results.append_column("finite", finite)
    return results


def join_scores(first: pa.Table, second: pa.Table) -> pa.Table:
    """The first table with the scores of a second one of the same samples in the same order.

    Raises:
        ValueError: If the samples are not the same.
    """
    if any(first[key].to_pylist() != second[key].to_pylist() for key in ("dataset", "index")):
        raise ValueError("the two results tables are not of the same samples in the same order")
    scores = [name for name in second.column_names if name not in (*KEYS, "finite")]
    return with_scores(first, {name: torch.from_numpy(second[name].to_numpy().copy()) for name in scores})


def largest(results: pa.Table, score: str, n: int = 20, dataset: str | None = None) -> pa.Table:
    """The samples with the largest values of a score, the largest first: what to look at when data is audited.

    Rows with NaN or Inf are left out. Of equal values the sample with the lower index comes first.

    Args:
        results: A per-sample table, as ``callback.results``.
        score: The name of its column.
        n: How many samples at the most.
        dataset: Of that data set; by default of each, one after the other.

    Returns:
        The columns ``dataset``, ``index``, ``label``, ``prediction``, and the score under its name.

    Raises:
        ValueError: If there is no such column or data set, or ``n`` is below 1.

    Example:
        >>> columns = {"dataset": ["train"] * 3, "index": [0, 1, 2], "prediction": [0, 1, 1], "label": [0, 1, 0]}
        >>> table = pa.table({**columns, "entropy": [0.1, 0.3, 0.9], "finite": [True] * 3})
        >>> largest(table, "entropy", n=2)["index"].to_pylist()
        [2, 1]
    """
    names = pc.unique(results["dataset"]).to_pylist()
    fields = [f.name for f in results.schema if pa.types.is_floating(f.type)]
    if score not in fields:
        raise ValueError(f"the results have no score {score!r}; theirs are: {', '.join(fields) or 'none'}")
    if dataset is not None and dataset not in names:
        raise ValueError(f"the results have no data set {dataset!r}; theirs are: {', '.join(names) or 'none'}")
    if n < 1:
        raise ValueError(f"n is {n}; expected at least 1 sample")
    known = results.filter(results["finite"]).select(["dataset", "index", "label", "prediction", score])
    ordered = known.sort_by([(score, "descending"), ("index", "ascending")])
    parts = [
        ordered.filter(pc.equal(ordered["dataset"], name)).slice(0, n) for name in names if dataset in (None, name)
    ]
    return pa.concat_tables(parts) if parts else known


def largest_of_each(results: pa.Table, counts: Mapping[str, int]) -> pa.Table:
    """:func:`largest` of several scores in one table, with the columns ``score`` and ``value``.

    Args:
        results: A per-sample table.
        counts: How many samples of each data set, by score.
    """
    parts = []
    for score, count in counts.items():
        found = largest(results, score, count)
        named = found.rename_columns([*found.column_names[:-1], "value"])
        parts.append(named.add_column(1, "score", pa.array([score] * named.num_rows, pa.string())))
    return pa.concat_tables(parts)
