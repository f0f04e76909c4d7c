"""Optional columns of the results: feature vectors, cosine similarity maps, and functions of the evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_gradmetrics.classifier.labels import described
from lightning_gradmetrics.results.table import RESERVED
from lightning_gradmetrics.scores.geometry import ClassCosines
from lightning_gradmetrics.scoring.evidence import Evidence

__all__ = ["Columns", "SampleIds", "check_columns", "check_sample_id", "column_values", "sample_ids"]

Columns = Mapping[str, Callable[[Evidence], Tensor]]
SampleIds = Callable[[Any], Sequence[Any]]


def features(evidence: Evidence) -> Tensor:
    """Return the head's input ``(N, D)``."""
    return evidence.features.float()


def cosine_maps(evidence: Evidence) -> Tensor:
    """Return the cosine similarity maps ``(N, C, C)``."""
    classes = evidence.logits.shape[1]
    return evidence.probe(ClassCosines(), (classes, classes)).float()


KNOWN: dict[str, Callable[[Evidence], Tensor]] = {"features": features, "cosine_maps": cosine_maps}


def check_columns(value: Any, taken: Sequence[str]) -> Columns:
    """Return the functions of the further columns by name.

    Args:
        value: Names of known columns, or a mapping from name to a function of the evidence that returns ``(N, ...)``.
        taken: The names of the score columns.

    Raises:
        TypeError: If it is neither.
        ValueError: If a name is unknown or taken.
    """
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, Iterable):
        raise TypeError(f"columns= is a {type(value).__name__}; expected names, as in columns=('features',)")
    columns = {}
    for name in names:
        function = names[name] if isinstance(names, Mapping) else KNOWN.get(name)
        if not callable(function):
            raise ValueError(f"columns= names {name!r}; available: {', '.join(KNOWN)}, or a mapping to functions")
        if name in (*taken, *RESERVED):
            raise ValueError(f"columns= names {name!r}, which is already a column of the results: rename it")
        columns[name] = function
    return columns


def column_values(columns: Columns, evidence: Evidence) -> dict[str, Tensor]:
    """Return the values ``(N, ...)`` of further columns for a batch, by name.

    Args:
        columns: The functions of the columns.
        evidence: The evidence of the batch.

    Raises:
        ValueError: If a function does not return one entry per sample.
    """
    size, values = len(evidence.logits), {}
    for name, function in columns.items():
        value = function(evidence)
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != size:
            raise ValueError(
                f"the function of the column {name!r} returned {described(value)} for a batch of {size} samples; expected a "
                f"tensor (N, ...) with one entry per sample, here ({size}, ...)"
            )
        values[name] = value
    return values


def check_sample_id(value: Any) -> SampleIds | None:
    """Return the function from a batch to the ids of its samples, or ``None``.

    Args:
        value: A key of a batch that is a mapping, a position in a batch that is a sequence, a function, or ``None``.

    Raises:
        TypeError: If it is of any other type.
    """
    if value is None or callable(value):
        return value  # type: ignore[no-any-return]
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return _Entry(value)
    raise TypeError(
        f"sample_id= is a {type(value).__name__}; expected a key of the batch, as in sample_id='path', a position in it, or a "
        "callable from the batch to one id per sample"
    )


class _Entry:
    """Returns an entry of a batch."""

    def __init__(self, key: str | int) -> None:
        self.key = key
        self.__qualname__ = f"entry {key!r}"

    def __call__(self, batch: Any) -> Sequence[Any]:
        """Return the entry.

        Raises:
            ValueError: If the batch has none.
        """
        try:
            return batch[self.key]  # type: ignore[no-any-return]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"sample_id={self.key!r}: the batch, a {type(batch).__name__}, has no such entry"
            ) from error


def sample_ids(function: SampleIds | None, batch: Any) -> list[str]:
    """Return the id of each sample of a batch as text; an empty list without a function."""
    if function is None:
        return []
    values = function(batch)
    plain = values.tolist() if isinstance(values, Tensor) else values
    return list(map(str, plain))
