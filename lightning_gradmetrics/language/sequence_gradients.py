"""Gradients of a sequence's loss with respect to the head's weight, from two small factors.

With the gradient of the logits ``g_t`` ``(V,)`` and the head's input ``h_t`` ``(D,)`` of token t, the head's gradient is
``G = sum_t g_t h_t^T``. If the weight is also the input embedding (tied weights), the embedding's use adds
``sum_s e_{x_s} delta_s^T``, where ``x_s`` is the input token at position s and ``delta_s`` the gradient of the embedding's
output. ``G`` has ``V D`` entries and is never stored as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.statistics import (
    GradientStatistics,
    Moment,
    Moments,
    accumulator,
    gradient_moments,
    moments_for,
    result_dtype,
)

__all__ = ["EmbeddingUse", "SequenceFactors", "SequenceGradient", "sequence_moments"]

BLOCK_ENTRIES = 2**21
"""Number of gradient entries that are computed at a time: 16 MiB in float64."""


@dataclass(frozen=True)
class EmbeddingUse:
    """The gradient that reaches a tied weight through the input embedding.

    Args:
        ids: The input tokens ``(S,)``.
        delta: The gradient of the embedding's output ``(S, D)``.
    """

    ids: Tensor
    delta: Tensor


@dataclass(frozen=True)
class SequenceFactors:
    """The factors of one sequence's head gradient.

    Args:
        output: The gradients of the head's outputs ``(T, V)``, with the weights of the tokens in the sequence's loss.
        features: The head's inputs ``(T, D)``.
        embedding: The use of a tied weight as the input embedding; ``None`` leaves it out.
    """

    output: Tensor
    features: Tensor
    embedding: EmbeddingUse | None = None

    @property
    def count(self) -> int:
        """The number of gradient entries, ``V D``."""
        return self.output.shape[1] * self.features.shape[1]


def sequence_moments(factors: SequenceFactors, wanted: Iterable[Moment]) -> Moments:
    """Return moments of the entries of one sequence's head gradient.

    The sum and the sum of squares are computed from the Gram matrices of the factors, ``(T, T)``, if that is cheaper.
    All other moments are computed from the gradient in blocks of rows.

    Args:
        factors: The factors.
        wanted: The moments to compute.

    Returns:
        Each moment, ``()``, in float64 if the device supports it.

    Example:
        >>> factors = SequenceFactors(torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 3.0]]))
        >>> sequence_moments(factors, [1.0, 2.0])
        {1.0: tensor(10., dtype=torch.float64), 2.0: tensor(26., dtype=torch.float64)}
    """
    keys = set(wanted)
    factors = _exact(factors)
    tokens, (vocabulary, width) = len(factors.output), (factors.output.shape[1], factors.features.shape[1])
    functions: dict[Moment, Callable[[SequenceFactors], Tensor]] = {"sum": _sum, 2.0: _sum_of_squares}
    if keys <= functions.keys() and tokens * (vocabulary + width) < vocabulary * width:
        return {key: functions[key](factors) for key in keys}
    return _moments_by_blocks(factors, keys)


def _exact(factors: SequenceFactors) -> SequenceFactors:
    dtype, embedding = accumulator(factors.output), factors.embedding
    if embedding is not None:
        embedding = EmbeddingUse(embedding.ids, embedding.delta.to(dtype))
    return SequenceFactors(factors.output.to(dtype), factors.features.to(dtype), embedding)


def _sum(factors: SequenceFactors) -> Tensor:
    """Return the sum of all entries, ``sum_t (1.g_t)(1.h_t)``, plus the embedding's use."""
    total = (factors.output.sum(1) * factors.features.sum(1)).sum()
    return total if factors.embedding is None else total + factors.embedding.delta.sum()


def _sum_of_squares(factors: SequenceFactors) -> Tensor:
    """``|A + B|^2 = |A|^2 + 2 <A, B> + |B|^2`` with the output's use A and the embedding's use B."""
    g, h = factors.output, factors.features
    square = ((g @ g.T) * (h @ h.T)).sum()
    if factors.embedding is None:
        return square
    ids, delta = factors.embedding.ids, factors.embedding.delta
    crossed = (g[:, ids] * (h @ delta.T)).sum()
    is_same_row = ids[:, None] == ids[None, :]
    return square + 2 * crossed + ((delta @ delta.T) * is_same_row).sum()


def _moments_by_blocks(factors: SequenceFactors, keys: Collection[Moment]) -> Moments:
    total: Moments = {}
    for block in _blocks(factors):
        for key, value in gradient_moments(block.reshape(1, -1), keys).items():
            total[key] = _merged(key, total.get(key), value[0])
    return total


def _merged(key: Moment, total: Tensor | None, value: Tensor) -> Tensor:
    if total is None:
        return value
    if key == "max":
        return torch.maximum(total, value)
    return torch.minimum(total, value) if key == "min" else total + value


def _blocks(factors: SequenceFactors) -> Iterator[Tensor]:
    """Yield the gradient in blocks with a limited number of rows."""
    vocabulary, width = factors.output.shape[1], factors.features.shape[1]
    rows = max(1, BLOCK_ENTRIES // width)
    for start in range(0, vocabulary, rows):
        block = factors.output[:, start : start + rows].T @ factors.features
        if factors.embedding is not None:
            _add_embedding_rows(block, factors.embedding, start)
        yield block


def _add_embedding_rows(block: Tensor, embedding: EmbeddingUse, start: int) -> None:
    """Add the embedding's use to the rows of a block that begins at row ``start``."""
    is_inside = (embedding.ids >= start) & (embedding.ids < start + len(block))
    block.index_add_(0, embedding.ids[is_inside] - start, embedding.delta[is_inside])


@dataclass(frozen=True)
class SequenceGradient:
    """The head gradients of several sequences' losses: statistics ``(N,)``.

    Args:
        sequences: The factors of each sequence.
        dtype: The type of the logits.
    """

    sequences: Sequence[SequenceFactors]
    dtype: torch.dtype = torch.float64
    _known: dict[Moment, Tensor] = field(default_factory=dict, repr=False)

    def statistic(self, name: str) -> Tensor:
        """Return a statistic by name, ``(N,)``."""
        wanted = moments_for([name])
        missing = wanted - self._known.keys()
        if missing:
            self._known.update(self._moments(missing))
        count = torch.tensor(self.sequences[0].count)
        return GradientStatistics(("head",), count, self._known, result_dtype(self.dtype)).statistic(name)

    def norm(self, p: float = 2.0) -> Tensor:
        """Return the p-norm, ``(N,)``."""
        return self.statistic(f"l{p:g}")

    def _moments(self, wanted: Collection[Moment]) -> Moments:
        columns: dict[Moment, list[Tensor]] = {}
        for factors in self.sequences:
            for key, value in sequence_moments(factors, wanted).items():
                columns.setdefault(key, []).append(value)
        return {key: torch.stack(values) for key, values in columns.items()}
