"""Statistics of a sample's gradient entries, computed from sufficient statistics.

A *moment* is one sufficient statistic. Its key is ``"sum"``, ``"max"``, ``"min"``, or a number ``p > 0`` for ``sum |x|^p``.
Moments of parameters, chunks and micro-batches are merged by sum, max and min, so the whole gradient is never needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.blocks import by_blocks
from lightning_gradmetrics.gradients.lost_digits import may_have_lost, squares_in_graph
from lightning_gradmetrics.gradients.powers import power_sum, sums_of_normal_roots
from lightning_gradmetrics.gradients.precision import accumulator, at_least_float32, result_dtype

__all__ = [
    "STATISTICS",
    "GradientStatistics",
    "Moment",
    "Moments",
    "accumulator",
    "axis_moments",
    "factor_moments",
    "factors_moments_for",
    "gradient_moments",
    "merged_moments",
    "moments_for",
    "product_moments",
    "result_dtype",
    "stacked_moments",
]

Moment = Literal["sum", "max", "min"] | float
Moments = dict[Moment, Tensor]

STATISTICS = ("max", "min", "mean", "std", "l1", "l2", "linf")
"""The named statistics. ``l<p>`` with any other ``p > 0``, such as ``l3`` or ``l0.5``, is a p-norm too."""

EXTREMES: frozenset[Moment] = frozenset({"max", "min"})
"""The moments of an outer product that follow from the extremes of its factors."""

SPREAD = 1e-16
"""The smallest standard deviation, relative to the root mean square of the entries."""


def moments_for(statistics: Iterable[str]) -> frozenset[Moment]:
    """Return the moments that the named statistics need.

    Args:
        statistics: Names from :data:`STATISTICS`, or ``l<p>``.

    Raises:
        ValueError: If a name is unknown.

    Example:
        >>> sorted(moments_for(["std", "linf"]), key=str)
        [2.0, 'max', 'min', 'sum']
    """
    return _moments_for((statistics,) if isinstance(statistics, str) else tuple(statistics))


@lru_cache(maxsize=256)
def _moments_for(names: tuple[str, ...]) -> frozenset[Moment]:
    if not names:
        raise ValueError(
            f"statistics must name at least one of {', '.join(STATISTICS)}, and l<p> for a p-norm with p > 0"
        )
    wanted: set[Moment] = set()
    for name in names:
        wanted |= _NEEDED[name] if name in _NEEDED else _norm_moments(name)
    return frozenset(wanted)


_NEEDED: dict[str, set[Moment]] = {"max": {"max"}, "min": {"min"}, "mean": {"sum"}, "std": {"sum", 2.0}}


@lru_cache(maxsize=256)
def _norm_moments(name: str) -> frozenset[Moment]:
    """Return the moments of ``l<p>``."""
    try:
        p = float(name.removeprefix("l")) if name.startswith("l") else -1.0
    except (ValueError, AttributeError):
        p = -1.0
    if not p > 0:
        raise ValueError(
            f"unknown statistic {name!r}; available: {', '.join(STATISTICS)}, and l<p> for a p-norm with p > 0"
        )
    return frozenset({"max", "min"} if math.isinf(p) else {p})


def gradient_moments(gradient: Tensor, wanted: Iterable[Moment]) -> Moments:
    """Compute moments of per-sample gradients that are given as tensors.

    Args:
        gradient: ``(N, ...)``, one gradient per sample.
        wanted: The moments to compute.

    Returns:
        Each moment, ``(N,)``, in the type :func:`~lightning_gradmetrics.gradients.precision.accumulator`.

    Example:
        >>> gradient_moments(torch.tensor([[1.0, -2.0]]), ["max", 1.0])
        {'max': tensor([1.], dtype=torch.float64), 1.0: tensor([3.], dtype=torch.float64)}
    """
    return axis_moments(gradient.reshape(len(gradient), math.prod(gradient.shape[1:])), wanted)


def axis_moments(entries: Tensor, wanted: Iterable[Moment], dtype: torch.dtype | None = None) -> Moments:
    """Compute moments over axis 1 only, separately for each position of the axes after it.

    Args:
        entries: ``(N, A, *P)``.
        wanted: The moments to compute.
        dtype: The type of the computations; by default that of the entries, at least float32.

    Returns:
        Each moment, ``(N, *P)``.
    """
    entries = at_least_float32(entries)
    may_lose = entries.dtype == torch.float32 and entries.is_cpu
    is_unreadable = may_lose and bool(torch._C._len_torch_dispatch_stack())  # as in a graph
    moments: Moments = {}
    for key in wanted:
        has_powers = may_lose and not isinstance(key, str) and key > 1
        if has_powers and is_unreadable:
            moment = squares_in_graph(entries) if key == 2 else _moment(entries.double(), key)
        elif dtype is None or dtype == entries.dtype:
            moment = _moment(entries, key)
        else:
            moment = _wide_moment(entries, key, dtype)
        moments[key] = moment.to(accumulator(entries))
        if has_powers and not is_unreadable and may_have_lost(moments[key]):
            moments[key] = _wide_moment(entries, key, torch.float64)
    return moments


def _wide_moment(entries: Tensor, key: Moment, dtype: torch.dtype) -> Tensor:
    """Return a moment that is computed in a wider type, without a copy of all entries in it."""
    if key in ("max", "min"):
        return _moment(entries, key)
    if key == "sum":
        return entries.sum(1, dtype=dtype)
    if key == 1.0:
        return entries.abs().sum(1, dtype=dtype)
    if key == 0.5 and (entries.dtype, dtype) == (torch.float32, torch.float64):
        return by_blocks(lambda block: sums_of_normal_roots(block.to(dtype)), entries)
    return by_blocks(lambda block: _moment(block.to(dtype), key), entries)


def _moment(flat: Tensor, key: Moment) -> Tensor:
    if key == "sum":
        return flat.sum(1)
    if key == "max":
        return flat.amax(1)
    if key == "min":
        return flat.amin(1)
    if key == 1.0:
        return flat.abs().sum(1)
    if key == 2.0:
        squares: Tensor = torch.linalg.vecdot(flat, flat, dim=1)  # the first factor is conjugated
        return squares.real if squares.is_complex() else squares
    return power_sum(flat, float(key))


def factor_moments(left: Tensor, right: Tensor, wanted: Iterable[Moment]) -> Moments:
    """Compute moments of the outer products ``left_n right_n^T`` without computing the products.

    Every moment factorises: the sum and the sums of powers are products of the factors' moments, and the extremes are
    products of the factors' extremes.

    Args:
        left: ``(N, A, *P)``, for a linear layer the gradient of its output.
        right: ``(N, B, *P)``, for a linear layer its input.
        wanted: The moments to compute.

    Returns:
        Each moment of the ``A B`` entries, ``(N, *P)``.
    """
    needed = factors_moments_for(wanted)
    return product_moments(axis_moments(left, needed), axis_moments(right, needed), wanted)


def factors_moments_for(wanted: Iterable[Moment]) -> frozenset[Moment]:
    """Return the moments of two factors that the moments of their outer product need."""
    keys = frozenset(wanted)
    return keys | EXTREMES if keys & EXTREMES else keys


def product_moments(a: Moments, b: Moments, wanted: Iterable[Moment]) -> Moments:
    """Compute the moments of an outer product from the moments of its factors.

    Args:
        a: Moments of the left factor, each of the same shape.
        b: Moments of the right factor.
        wanted: The moments to compute.
    """
    keys, extremes = set(wanted), EXTREMES
    out: Moments = {key: a[key] * b[key] for key in keys - extremes}
    if keys & extremes:
        ends = torch.stack([a["max"], a["min"]])
        corners = (ends[:, None] * torch.stack([b["max"], b["min"]])).flatten(0, 1)
        both: Moments = {"max": corners.amax(0), "min": corners.amin(0)}
        for key in keys & extremes:
            out[key] = both[key]
    return out


def stacked_moments(columns: Sequence[Mapping[Moment, Tensor]]) -> Moments:
    """Stack the moments ``(N,)`` of several parameters to ``(N, P)``."""
    stacked: Moments = {}
    for key in columns[0]:
        stacked[key] = torch.stack([column[key] for column in columns], 1)
    return stacked


def merged_moments(moments: Mapping[Moment, Tensor]) -> Moments:
    """Merge the moments ``(N, P)`` of several parameters to ``(N,)``."""
    merged: Moments = {}
    for key, value in moments.items():
        if key == "max":
            merged[key] = value.amax(1)
        else:
            merged[key] = value.amin(1) if key == "min" else value.sum(1)
    return merged


@dataclass(frozen=True)
class GradientStatistics:
    r"""Statistics of each sample's gradient entries: over all chosen parameters together, or for each parameter.

    ``max``, ``min``, ``mean`` and ``std`` are attributes, ``norm(p)`` the p-norms. Each has shape ``(N,)``, or ``(N, P)``
    for each parameter (``per_parameter=True``).

    Args:
        names: The parameters, in the order of the columns.
        count: The number of gradient entries: ``()``, or ``(P,)`` for each parameter.
        moments: The sufficient statistics, in float64 where the device has it.
        dtype: The type of the statistics.

    Raises:
        ValueError: From an attribute or ``norm``, if the statistic was not requested.

    Example:
        >>> stats = GradientStatistics.of({"w": torch.tensor([[1.0, -3.0]])})
        >>> stats.max, stats.norm(1)
        (tensor([1.]), tensor([4.]))
    """

    names: tuple[str, ...]
    count: Tensor
    moments: Mapping[Moment, Tensor]
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(
        cls, gradients: Mapping[str, Tensor], statistics: Iterable[str] = STATISTICS, per_parameter: bool = False
    ) -> GradientStatistics:
        """Compute the statistics of per-sample gradients that are given as tensors, ``{name: (N, ...)}``.

        Args:
            gradients: The gradients by parameter name.
            statistics: Names of the statistics.
            per_parameter: Whether to compute the statistics separately for each parameter.
        """
        wanted, columns, counts = moments_for(statistics), [], []
        for gradient in gradients.values():
            columns.append(gradient_moments(gradient, wanted))
            counts.append(gradient[:1].numel())
        dtype = result_dtype(next(iter(gradients.values())).dtype)
        result = cls(tuple(gradients), torch.tensor(counts), stacked_moments(columns), dtype)
        return result if per_parameter else result.merged()

    def merged(self) -> GradientStatistics:
        """Merge statistics per parameter into statistics over all parameters."""
        return GradientStatistics(self.names, self.count.sum(), merged_moments(self.moments), self.dtype)

    def select(self, parameters: Callable[[str], bool] | None) -> GradientStatistics:
        """Select some of the parameters of statistics per parameter.

        Args:
            parameters: A predicate on the parameter's name; ``None`` selects all.
        """
        columns = [i for i, name in enumerate(self.names) if parameters is None or parameters(name)]
        names = tuple(self.names[i] for i in columns)
        moments: Moments = {}
        for key, value in self.moments.items():
            moments[key] = value[:, columns]
        return GradientStatistics(names, self.count[columns], moments, self.dtype)

    def by_layer(self) -> GradientStatistics:
        """Merge statistics per parameter into statistics per layer (a module's weight and bias together)."""
        layers: dict[str, set[str]] = {}
        for name in self.names:
            layers.setdefault(name.rpartition(".")[0] or name, set()).add(name)
        counts, columns = [], []
        for members in layers.values():
            layer = self.select(members.__contains__).merged()
            counts.append(layer.count)
            columns.append(layer.moments)
        return GradientStatistics(tuple(layers), torch.stack(counts), stacked_moments(columns), self.dtype)

    def rows(self, keep: Tensor) -> GradientStatistics:
        """Select samples by a mask ``(N,)``, bool."""
        moments: Moments = {}
        for key, value in self.moments.items():
            moments[key] = value[keep]
        return replace(self, moments=moments)

    def _moment(self, key: Moment, statistic: str) -> Tensor:
        if key not in self.moments:
            raise ValueError(
                f"the statistic {statistic!r} was not computed; pass statistics=('{statistic}', ...) to compute it"
            )
        return self.moments[key]

    @property
    def max(self) -> Tensor:
        """The largest entry."""
        return self._moment("max", "max").to(self.dtype)

    @property
    def min(self) -> Tensor:
        """The smallest entry."""
        return self._moment("min", "min").to(self.dtype)

    @property
    def mean(self) -> Tensor:
        """The mean of the entries."""
        return (self._moment("sum", "mean") / self.count.to(self.moments["sum"].device)).to(self.dtype)

    @property
    def std(self) -> Tensor:
        """The unbiased standard deviation of the entries.

        The result is at least :data:`SPREAD` times the root mean square of the entries. This floor is below rounding and
        keeps the standard deviation of equal entries, and of a single entry, above zero. It is relative because
        confident samples have small gradients; with a constant floor they would all have the same standard deviation. A
        zero gradient has the standard deviation ``SPREAD``. Where the sum of squares overflows, it is infinite, as the L2 norm is.
        """
        total, square = self._moment("sum", "std"), self._moment(2.0, "std")
        count = self.count.to(total.device)
        # The square of the total may overflow where the sum of squares does not.
        variance = (square - total / count * total).clamp(min=0) / (count - 1).clamp(min=1)
        variance = torch.where(square.isinf() & total.isfinite(), square, variance)
        size = (square / count).sqrt()
        floor = SPREAD * torch.where(size > 0, size, 1)
        return torch.maximum(variance.sqrt(), floor).to(self.dtype)

    def norm(self, p: float = 2.0) -> Tensor:
        """Return the p-norm of the entries, ``(sum |x|^p)^(1/p)``.

        Args:
            p: In ``(0, inf]``.
        """
        if math.isinf(p):
            return torch.maximum(self._moment("max", "linf"), -self._moment("min", "linf")).to(self.dtype)
        return self._moment(float(p), f"l{p:g}").pow(1 / p).to(self.dtype)

    def statistic(self, name: str) -> Tensor:
        """Return a statistic by its name.

        Args:
            name: From :data:`STATISTICS`, or ``l<p>``.

        Raises:
            ValueError: If the name is unknown, or the statistic was not computed.
        """
        moments_for([name])
        if name in _NEEDED:
            value: Tensor = getattr(self, name)
            return value
        return self.norm(float(name[1:]))
