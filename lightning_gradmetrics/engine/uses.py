"""Uses: the contribution of one call to every sample's gradient of a parameter, kept in factors where possible."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels import (
    ConvGeometry,
    PositionTotals,
    conv_gradient,
    conv_moments,
    embedding_moments,
    linear_gradient,
    linear_moments,
    row_moments,
    touched_rows,
)
from lightning_gradmetrics.engine.kernels.reduction import CHUNK_ENTRIES
from lightning_gradmetrics.engine.kernels.segments import LARGEST, Factors
from lightning_gradmetrics.gradients.precision import at_least_float32
from lightning_gradmetrics.gradients.statistics import Moment, Moments, factor_moments, merged_moments

__all__ = [
    "ConvUse",
    "EmbeddingUse",
    "LinearUse",
    "OuterUse",
    "RowsUse",
    "StackedUse",
    "SumUse",
    "Use",
    "combined",
    "flat_rows",
    "merge_rows",
]


class Use(Protocol):
    """The gradients ``(N, *shape)`` of one parameter, in a form that avoids computing them in full."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def rows(self, start: int, stop: int) -> Use:
        """Return the use for some of the samples."""

    def gradient(self) -> Tensor:
        """Return the gradients, ``(N, *shape)``."""

    def moments(self, wanted: Iterable[Moment]) -> Moments:
        """Return their moments, ``(N,)`` each."""


def merge_rows(parts: Sequence[Moments]) -> Moments:
    """Return the moments of all samples, from the moments of consecutive groups."""
    merged = {}
    for key in parts[0]:
        merged[key] = torch.cat([moments[key] for moments in parts])
    return merged


def chunked_moments(use: Use, wanted: Iterable[Moment]) -> Moments:
    """Return the moments of a use from its gradients, a limited number of entries at a time."""
    keys, step = frozenset(wanted), max(1, CHUNK_ENTRIES // max(1, math.prod(use.shape)))
    parts = []
    for start in range(0, max(1, len(use)), step):
        gradients = use.rows(start, start + step).gradient()
        parts.append(row_moments(flat_rows(gradients), keys))
    return merge_rows(parts)


def flat_rows(rows: Tensor) -> Tensor:
    """Return ``(N, ...)`` as ``(N, D)``."""
    if rows.ndim == 2:
        return rows
    return rows.reshape(len(rows), math.prod(rows.shape[1:]))


@dataclass(frozen=True)
class RowsUse:
    """Gradients that are already computed, ``(N, *shape)``."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return tuple(self.value.shape[1:])

    def __len__(self) -> int:
        return len(self.value)

    def rows(self, start: int, stop: int) -> RowsUse:  # noqa: D102
        return RowsUse(self.value[start:stop])

    def gradient(self) -> Tensor:  # noqa: D102
        return at_least_float32(self.value)

    def moments(self, wanted: Iterable[Moment]) -> Moments:  # noqa: D102
        return row_moments(flat_rows(self.value), wanted)

    def factors(self) -> Factors:
        """Return the gradients as rows."""
        rows = at_least_float32(self.value)
        return (rows if rows.ndim == 2 else flat_rows(rows)), None


@dataclass(frozen=True)
class LinearUse:
    """``G_n = sum_t g_nt a_nt^T``, of shape ``(O, I)``, or its transpose.

    Args:
        a: ``(N, T, I)``.
        g: ``(N, T, O)``.
        transposed: Whether the parameter is ``(I, O)``.
        totals: Receives the sums of ``g`` over the positions, if they are computed beside the moments.
    """

    a: Tensor
    g: Tensor
    transposed: bool = False
    totals: PositionTotals | None = None

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        sizes = (self.g.shape[2], self.a.shape[2])
        return sizes[::-1] if self.transposed else sizes

    def __len__(self) -> int:
        return len(self.a)

    def rows(self, start: int, stop: int) -> LinearUse:  # noqa: D102
        return replace(self, a=self.a[start:stop], g=self.g[start:stop], totals=None)

    def gradient(self) -> Tensor:  # noqa: D102
        gradient = linear_gradient(at_least_float32(self.a), at_least_float32(self.g))
        return gradient.mT if self.transposed else gradient

    def moments(self, wanted: Iterable[Moment]) -> Moments:  # noqa: D102
        if self.a.shape[1] == 1:
            return factor_moments(self.g[:, 0], self.a[:, 0], wanted)
        return linear_moments(self.a, self.g, wanted, self.totals)


@dataclass(frozen=True)
class OuterUse:
    """Outer products ``left_n right_n^T``, of shape ``(A, B)``, as for a linear layer with one position per sample.

    Args:
        left: ``(N, A)``.
        right: ``(N, B)``.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return (self.left.shape[1], self.right.shape[1])

    def __len__(self) -> int:
        return len(self.left)

    def rows(self, start: int, stop: int) -> OuterUse:  # noqa: D102
        return OuterUse(self.left[start:stop], self.right[start:stop])

    def gradient(self) -> Tensor:  # noqa: D102
        return self.sequence().gradient()

    def moments(self, wanted: Iterable[Moment]) -> Moments:  # noqa: D102
        return factor_moments(self.left, self.right, wanted)

    def factors(self) -> Factors:
        """Return both factors."""
        return at_least_float32(self.left), at_least_float32(self.right)

    def sequence(self) -> LinearUse:
        """Return the same gradients as those of a linear layer with a sequence of length 1."""
        return LinearUse(self.right.unsqueeze(1), self.left.unsqueeze(1))


@dataclass(frozen=True)
class ConvUse:
    """The weight gradient of a convolution with ``times`` inputs per sample.

    Args:
        x: Its input, ``(N, times, C, *S)``; for a transposed convolution the gradient of its output.
        g: The gradient of its output, ``(N, times, C', *S')``; for a transposed convolution its input.
        shape: The weight's shape.
        geometry: Kernel size, stride, padding, dilation and groups.
        totals: Receives the sums of ``g`` over the positions, if they are computed beside the moments.
    """

    x: Tensor
    g: Tensor
    shape: tuple[int, ...]
    geometry: ConvGeometry
    totals: PositionTotals | None = None

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, start: int, stop: int) -> ConvUse:  # noqa: D102
        return replace(self, x=self.x[start:stop], g=self.g[start:stop], totals=None)

    def gradient(self) -> Tensor:  # noqa: D102
        x, g = at_least_float32(self.x), at_least_float32(self.g)
        joined = self.joined(x, g)
        if joined is not None:
            return conv_gradient(*joined).reshape(len(x), *self.shape)
        flat = conv_gradient(x.flatten(0, 1), g.flatten(0, 1), self.geometry)
        return flat.reshape(*x.shape[:2], *self.shape).sum(1)

    def moments(self, wanted: Iterable[Moment]) -> Moments:  # noqa: D102
        joined = self.joined(self.x, self.g)
        return chunked_moments(self, wanted) if joined is None else conv_moments(*joined, wanted, self.totals)

    def joined(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, ConvGeometry] | None:
        """Return one convolution per sample, see :meth:`.ConvGeometry.joined`.

        Args:
            x: The input, or its rows of some samples in some type.
            g: The same rows of the gradient of the output.

        Returns:
            The input, the gradient and the geometry; ``None`` if there is no such convolution.
        """
        inputs, gradients = self.geometry.joined(x), self.geometry.joined(g)
        return None if inputs is None or gradients is None else (inputs[0], gradients[0], inputs[1])


@dataclass(frozen=True)
class EmbeddingUse:
    """The gradient of an embedding's table: ``g`` added at the rows ``indices``.

    Args:
        indices: ``(N, T)``.
        g: ``(N, T, D)``.
        shape: The table's shape.
        padding: The row without a gradient, or ``None``.
    """

    indices: Tensor
    g: Tensor
    shape: tuple[int, ...]
    padding: int | None = None

    def __len__(self) -> int:
        return len(self.g)

    def rows(self, start: int, stop: int) -> EmbeddingUse:  # noqa: D102
        return replace(self, indices=self.indices[start:stop], g=self.g[start:stop])

    def gradient(self) -> Tensor:  # noqa: D102
        g = at_least_float32(self.g)
        if self.padding is not None:
            g = g.masked_fill((self.indices == self.padding).unsqueeze(-1), 0)
        table = g.new_zeros(len(g), *self.shape)
        return table.scatter_add_(1, self.indices.unsqueeze(-1).expand_as(g), g)

    def moments(self, wanted: Iterable[Moment]) -> Moments:  # noqa: D102
        return embedding_moments(self.indices, self.g, self.shape[0], self.padding, wanted)

    def factors(self) -> Factors | None:
        """Return the gradients of the rows that a sample looks up, and a zero; ``None`` if they are many, or may be all rows."""
        samples, positions, width = self.g.shape
        if not self.g.is_cpu or not 0 < positions < self.shape[0] or samples * (positions + 1) * width > LARGEST:
            return None
        return touched_rows(self.indices, self.g, self.padding).flatten(1), None


@dataclass(frozen=True)
class StackedUse:
    """Gradients of entries along the first axis of a parameter, such as one matrix for each expert; those of other entries are zero.

    Args:
        parts: The use of each entry, at least one.
        length: The length of the axis.
    """

    parts: Mapping[int, Use]
    length: int

    @property
    def _first(self) -> Use:
        return next(iter(self.parts.values()))

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return (self.length, *self._first.shape)

    def __len__(self) -> int:
        return len(self._first)

    def rows(self, start: int, stop: int) -> StackedUse:  # noqa: D102
        return replace(self, parts={index: part.rows(start, stop) for index, part in self.parts.items()})

    def gradient(self) -> Tensor:  # noqa: D102
        parts = {index: part.gradient() for index, part in self.parts.items()}
        zeros = torch.zeros_like(next(iter(parts.values())))
        return torch.stack([parts.get(index, zeros) for index in range(self.length)], 1)

    def moments(self, wanted: Iterable[Moment]) -> Moments:  # noqa: D102
        keys = frozenset(wanted)
        parts = [part.moments(keys) for part in self.parts.values()]
        stacked: Moments = {}
        for key in keys:
            columns = [moments[key] for moments in parts]
            if len(parts) < self.length:  # of the zeros
                columns.append(torch.zeros_like(columns[0]))
            stacked[key] = torch.stack(columns, 1)
        return merged_moments(stacked)


@dataclass(frozen=True)
class SumUse:
    """The sum of several uses of one parameter."""

    uses: tuple[Use, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return self.uses[0].shape

    def __len__(self) -> int:
        return len(self.uses[0])

    def rows(self, start: int, stop: int) -> SumUse:  # noqa: D102
        return SumUse(tuple(use.rows(start, stop) for use in self.uses))

    def gradient(self) -> Tensor:  # noqa: D102
        total = self.uses[0].gradient()
        for use in self.uses[1:]:
            total = total + use.gradient()
        return total

    def moments(self, wanted: Iterable[Moment]) -> Moments:  # noqa: D102
        return chunked_moments(self, wanted)


def combined(uses: Sequence[Use]) -> Use:
    """Return all uses of one parameter as one use: linear, embedding and stacked uses are joined, others are added."""
    if len(uses) == 1:
        return uses[0]
    uses = list(map(_as_sequence, uses))
    first = uses[0]
    kinds = {(type(use), getattr(use, "transposed", None), getattr(use, "padding", None)) for use in uses}
    if len(kinds) == 1 and isinstance(first, LinearUse):
        return replace(first, a=_joined(uses, "a"), g=_joined(uses, "g"), totals=None)
    if len(kinds) == 1 and isinstance(first, EmbeddingUse):
        return replace(first, indices=_joined(uses, "indices"), g=_joined(uses, "g"))
    if len(kinds) == 1 and isinstance(first, StackedUse):
        return replace(first, parts=_joined_parts(uses))
    total = SumUse(tuple(uses))
    if len(kinds) == 1 and isinstance(first, RowsUse):
        return RowsUse(total.gradient())
    return total


def _joined_parts(uses: Iterable[Use]) -> dict[int, Use]:
    """Return all uses of each entry as one use."""
    parts: dict[int, list[Use]] = {}
    for use in uses:
        for index, part in use.parts.items():  # type: ignore[attr-defined]
            parts.setdefault(index, []).append(part)
    return {index: combined(of_index) for index, of_index in parts.items()}


def _as_sequence(use: Use) -> Use:
    return use.sequence() if isinstance(use, OuterUse) else use


def _joined(uses: Sequence[Use], field: str) -> Tensor:
    """Return one field of all uses, joined along the positions."""
    return torch.cat([getattr(use, field) for use in uses], 1)
