"""Sums over the positions of a layer's output gradient, which a kernel computes beside the moments of the weight's gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_gradmetrics.engine.kernels.reduction import position_sums
from lightning_gradmetrics.engine.kernels.traced import stacked_by_name
from lightning_gradmetrics.gradients.precision import wide_dtype
from lightning_gradmetrics.gradients.statistics import Moments, accumulator

__all__ = ["PositionTotals", "empty_results", "new_totals", "operator_results"]


@dataclass
class PositionTotals:
    """The gradients of a bias, ``sum_p g_p``, if the kernel of the weight's gradient has computed them.

    Args:
        value: ``(N, O)``; ``None`` if no kernel has computed them.
    """

    value: Tensor | None = None

    def rows(self, g: Tensor) -> Tensor:
        """Return the gradients ``(N, O)``, in float32 for half precision.

        Args:
            g: The gradient of the layer's output, ``(N, O, *S)``, which is summed here if no kernel has done that.
        """
        value = position_sums(g)[0] if self.value is None else self.value
        return value.to(wide_dtype(g.dtype))


def new_totals(totals: PositionTotals | None, g: Tensor) -> Tensor | None:
    """Return memory to which a kernel writes the sums, and store it in ``totals``; ``None`` if they are not wanted.

    Args:
        totals: Receives the sums.
        g: The gradient of the layer's output, ``(N, O, *S)``.
    """
    if totals is None:
        return None
    totals.value = g.new_empty(g.shape[0], g.shape[1])
    return totals.value


def operator_results(moments: Moments, names: str, totals: PositionTotals | None, g: Tensor) -> list[Tensor]:
    """Return the results of an operator: moments ``(K, N)`` in the order of their names, and the sums if they are wanted.

    Args:
        moments: The moments ``(N,)``.
        names: Their names.
        totals: The sums.
        g: The gradient of the layer's output, ``(N, O, *S)``.
    """
    rows = [stacked_by_name(moments, names)]
    return rows if totals is None else [*rows, totals.rows(g)]


def empty_results(g: Tensor, moments: int, columns: int) -> list[Tensor]:
    """Return tensors like the results of :func:`operator_results`, with any values.

    Args:
        g: The gradient of the layer's output, ``(N, ...)``.
        moments: The number of moments.
        columns: The number of sums of a sample; 0 if they are not wanted.
    """
    rows = [g.new_empty(moments, len(g), dtype=accumulator(g))]
    return [*rows, g.new_empty(len(g), columns, dtype=wide_dtype(g.dtype))] if columns else rows
