"""Sufficient statistics of a sample's gradient entries, and what follows from them.

A *moment* is one sufficient statistic. Its key is ``"sum"``, ``"max"``, ``"min"``, or a number ``p > 0`` for ``sum |x|^p``.
Moments merge across parameters, chunks and micro-batches by add, max and min, so no reduction needs the whole gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.precision import accumulator, at_least_float32, result_dtype

__all__ = [
    "STATISTICS",
    "GradientStatistics",
    "Moment",
    "Moments",
    "accumulator",
    "factor_moments",
    "gradient_moments",
    "moments_for",
    "result_dtype",
]

Moment = Literal["sum", "max", "min"] | float
Moments = dict[Moment, Tensor]

STATISTICS = ("max", "min", "mean", "std", "l1", "l2", "linf")
"""The named statistics. ``l<p>`` with any other ``p > 0``, such as ``l3`` or ``l0.5``, is a p-norm too."""

SPREAD = 1e-16
"""The least standard deviation, relative to the root mean square of the entries."""


def moments_for(statistics: Iterable[str]) -> frozenset[Moment]:
    """The moments that the named statistics need.

    Args:
        statistics: Names from :data:`STATISTICS`, or ``l<p>``.

    Raises:
        ValueError: If a name is unknown.

    Example:
        >>> sorted(moments_for(["std", "linf"]), key=str)
        [2.0, 'max', 'min', 'sum']
    """
    known: dict[str, set[Moment]] = {"max": {"max"}, "min": {"min"}, "mean": {"sum"}, "std": {"sum", 2.0}}
    wanted: set[Moment] = set()
    for name in (statistics,) if isinstance(statistics, str) else statistics:
        wanted |= known[name] if name in known else _norm_moments(name)
    return frozenset(wanted)


def _norm_moments(name: str) -> set[Moment]:
    try:
        p = float(name.removeprefix("l")) if name.startswith("l") else -1.0
    except ValueError:
        p = -1.0
    if not p > 0:
        raise ValueError(
            f"unknown statistic {name!r}; available: {', '.join(STATISTICS)}, and l<p> for a p-norm with p > 0"
        )
    return {"max", "min"} if math.isinf(p) else {p}


def gradient_moments(gradient: Tensor, wanted: Iterable[Moment]) -> Moments:
    """Moments of materialised per-sample gradients.

    Args:
        gradient: ``(N, ...)``, one gradient a sample.
        wanted: The moments to compute.

    Returns:
        Each moment, ``(N,)``, in :func:`accumulator` precision.

    Example:
        >>> gradient_moments(torch.tensor([[1.0, -2.0]]), ["max", 1.0])
        {'max': tensor([1.], dtype=torch.float64), 1.0: tensor([3.], dtype=torch.float64)}
    """
    flat = at_least_float32(gradient.reshape(len(gradient), math.prod(gradient.shape[1:])))
    return {key: _moment(flat, key).to(accumulator(flat)) for key in wanted}


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
        squares: Tensor = torch.linalg.vecdot(flat, flat)
        return squares
    return flat.abs().pow(float(key)).sum(1)


def factor_moments(left: Tensor, right: Tensor, wanted: Iterable[Moment]) -> Moments:
    """Moments of the outer products ``left_n right_n^T``, without forming them.

    Every moment of an outer product factorises: sums of powers and the sum multiply, and the extremes are among the
    products of the factors' extremes.

    Args:
        left: ``(N, A)``, for a linear layer the gradient of its output.
        right: ``(N, B)``, for a linear layer its input.
        wanted: The moments to compute.

    Returns:
        Each moment of the ``A B`` entries, ``(N,)``.
    """
    keys = set(wanted)
    extremes: set[Moment] = {"max", "min"}
    needed = keys | extremes if keys & extremes else keys
    a, b = gradient_moments(left, needed), gradient_moments(right, needed)
    out: Moments = {key: a[key] * b[key] for key in keys - extremes}
    if keys & extremes:
        corners = torch.stack([a[i] * b[j] for i in ("max", "min") for j in ("max", "min")])
        out |= {key: value for key, value in (("max", corners.amax(0)), ("min", corners.amin(0))) if key in keys}
    return out


@dataclass(frozen=True)
class GradientStatistics:
    r"""Statistics of each sample's gradient, over all chosen parameters together or per parameter.

    Everything is ``(N,)``, or ``(N, P)`` where it was asked per parameter.

    Args:
        names: The parameters covered, in the order of the columns.
        count: Number of gradient entries: ``()``, or ``(P,)`` per parameter.
        moments: The sufficient statistics, in float64.
        dtype: The type of what the properties return.

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
        """Statistics of materialised per-sample gradients ``{name: (N, ...)}``: the plain definition, for small things."""
        wanted = moments_for(statistics)
        rows = [gradient_moments(gradient, wanted) for gradient in gradients.values()]
        first = next(iter(gradients.values()))
        counts = torch.tensor([gradient[:1].numel() for gradient in gradients.values()])
        stacked = {key: torch.stack([row[key] for row in rows], 1) for key in wanted}
        result = cls(tuple(gradients), counts, stacked, result_dtype(first.dtype))
        return result if per_parameter else result.merged()

    def merged(self) -> GradientStatistics:
        """The statistics over all parameters together, from those per parameter."""
        reduce = {"max": lambda x: x.amax(1), "min": lambda x: x.amin(1)}
        moments = {key: reduce.get(key, lambda x: x.sum(1))(value) for key, value in self.moments.items()}  # type: ignore[arg-type]
        return GradientStatistics(self.names, self.count.sum(), moments, self.dtype)

    def select(self, parameters: Callable[[str], bool] | None) -> GradientStatistics:
        """Of statistics per parameter, those of the parameters whose name the predicate accepts; ``None`` accepts all."""
        columns = [i for i, name in enumerate(self.names) if parameters is None or parameters(name)]
        moments = {key: value[:, columns] for key, value in self.moments.items()}
        return GradientStatistics(tuple(self.names[i] for i in columns), self.count[columns], moments, self.dtype)

    def by_layer(self) -> GradientStatistics:
        """Of statistics per parameter, those per layer: the parameters of a module (its weight and its bias) taken together."""
        layers: dict[str, list[str]] = {}
        for name in self.names:
            layers.setdefault(name.rpartition(".")[0] or name, []).append(name)
        parts = [self.select(set(members).__contains__).merged() for members in layers.values()]
        moments = {key: torch.stack([part.moments[key] for part in parts], 1) for key in self.moments}
        return GradientStatistics(tuple(layers), torch.stack([part.count for part in parts]), moments, self.dtype)

    def rows(self, keep: Tensor) -> GradientStatistics:
        """The statistics of the samples that ``keep`` ``(N,)``, bool, marks."""
        return replace(self, moments={key: value[keep] for key, value in self.moments.items()})

    def _moment(self, key: Moment, statistic: str) -> Tensor:
        if key not in self.moments:
            raise ValueError(
                f"the statistic {statistic!r} was not asked for: add it to statistics=, as in statistics=('{statistic}',)"
            )
        return self.moments[key]

    @property
    def max(self) -> Tensor:
        """Largest entry."""
        return self._moment("max", "max").to(self.dtype)

    @property
    def min(self) -> Tensor:
        """Smallest entry."""
        return self._moment("min", "min").to(self.dtype)

    @property
    def mean(self) -> Tensor:
        """Mean of the entries."""
        return (self._moment("sum", "mean") / self.count.to(self.moments["sum"].device)).to(self.dtype)

    @property
    def std(self) -> Tensor:
        """Unbiased standard deviation of the entries.

        It is at least :data:`SPREAD` times the root mean square of the entries, which is below rounding, so that equal
        entries and a single entry have a positive one. The floor moves with the sample: the gradient of a confident sample
        is small as a whole, and a constant floor would make all of them equal. For a zero gradient it is ``SPREAD``.
        """
        total, square = self._moment("sum", "std"), self._moment(2.0, "std")
        count = self.count.to(total.device)
        variance = (square - total * total / count).clamp(min=0) / (count - 1).clamp(min=1)
        size = (square / count).sqrt()
        floor = SPREAD * torch.where(size > 0, size, 1)
        return torch.maximum(variance.sqrt(), floor).to(self.dtype)

    def norm(self, p: float = 2.0) -> Tensor:
        """The p-norm of the entries, ``(sum |x|^p)^(1/p)``, for ``p`` in ``(0, inf]``."""
        if math.isinf(p):
            return torch.maximum(self._moment("max", "linf"), -self._moment("min", "linf")).to(self.dtype)
        return self._moment(float(p), f"l{p:g}").pow(1 / p).to(self.dtype)

    def statistic(self, name: str) -> Tensor:
        """A statistic by its name in :data:`STATISTICS`."""
        moments_for([name])
        return getattr(self, name) if name in ("max", "min", "mean", "std") else self.norm(float(name[1:]))  # type: ignore[no-any-return]
