"""Moments of many small matrices, and of outer products of their rows, in one call of a compiled kernel.

The parameters of small networks have few entries each. One call for all of them saves several torch calls per parameter.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.jobs import SegmentJob
from lightning_gradmetrics.engine.kernels.library import library_for, parallel_runner
from lightning_gradmetrics.engine.kernels.native import ONE_THREAD_ENTRIES, supports
from lightning_gradmetrics.engine.kernels.operators import operator
from lightning_gradmetrics.engine.kernels.partial import ORDER
from lightning_gradmetrics.gradients.statistics import Moment, Moments

__all__ = ["Factors", "Segments", "chosen_moments"]

LARGEST = 2**18
"""Largest number of entries of a matrix that is collected; larger ones are reduced immediately."""

MOST = 512
"""Largest number of matrices in one call."""

Factors = tuple[Tensor, Tensor | None]
"""A matrix ``(N, D)``, or the two factors ``(N, A)`` and ``(N, B)`` of outer products."""


class Segments:
    """The rows whose moments are computed together.

    Args:
        wanted: The moments to compute.
    """

    def __init__(self, wanted: Iterable[Moment]) -> None:
        self._wanted = frozenset(wanted)
        self._are_known = self._wanted <= set(ORDER)
        # In a graph, inductor fuses mere sums with the operations before them, which is faster than a call of the kernel.
        self._has_extremes = not self._wanted <= {"sum", 2.0}
        self._matrices: list[Tensor] = []
        self._versions: list[int] = []
        self._numbers: dict[int, int] = {}
        self._left: list[int] = []
        self._right: list[int] = []
        self._known: list[Tensor | None] = []
        self.names: list[str] = []

    def add(self, name: str, factors: Factors) -> bool:
        """Add a parameter's gradients; return False if they cannot be computed here."""
        left, right = factors
        left_number = self._number(left)
        right_number = -1 if right is None or left_number is None else self._number(right)
        if left_number is None or right_number is None:
            return False
        self.names.append(name)
        self._left.append(left_number)
        self._right.append(right_number)
        return True

    def add_known(self, known: Mapping[str, Moments]) -> bool:
        """Add the moments ``(N,)`` of parameters that were computed before; return False if they cannot be merged here.

        They are scaled, and merged with the others, by the same call. Something else must have been added.
        """
        columns: list[Tensor | None] = []
        for moments in known.values():
            columns += map(moments.get, ORDER)
        if not self._matrices or not all(column is None or _is_double(column) for column in columns):
            return False
        first = len(self._known) // len(ORDER)
        self._known += columns
        self.names += known
        self._left += range(-1 - first, -1 - first - len(known), -1)
        self._right += [-1] * len(known)
        return True

    def _takes(self, matrix: Tensor) -> bool:
        matrices = self._matrices
        if matrices:
            is_supported = matrix.dtype is matrices[0].dtype and matrix.is_cpu
        else:
            is_supported = self._are_known and supports(matrix, self._wanted, in_graph=self._has_extremes)
        is_small = len(matrices) < MOST - 1 and 0 < matrix.numel() <= LARGEST
        return is_supported and is_small and (matrix.stride(1) == 1 or matrix.shape[1] == 1)

    def _number(self, matrix: Tensor) -> int | None:
        """Return a matrix's number, ``None`` if it is not supported; a layer's weight and bias share the gradient of its output."""
        number = self._numbers.get(id(matrix))
        if number is None and self._takes(matrix):
            number = self._numbers[id(matrix)] = len(self._matrices)
            self._matrices.append(matrix)
            self._versions.append(matrix._version)
        return number

    def unchanged(self) -> bool:
        """Return whether no matrix was changed in place since it was added."""
        return self._versions == [matrix._version for matrix in self._matrices]

    def statistics(self, names: Sequence[str], undo: Tensor | None = None, merged: bool = False) -> Tensor:
        """Return the moments in the order of ``ORDER``, for each parameter and then over all of them, ``(5, P + 1, N)``.

        :func:`chosen_moments` chooses the wanted ones; the others may be undefined.

        Args:
            names: The parameters that were added, in the order of the columns.
            undo: Factors of the gradients, ``(N,)``.
            merged: Whether to return only those over all parameters, ``(5, 1, N)``.
        """
        numbers = dict(zip(self.names, range(len(self.names)), strict=True))
        order = list(map(numbers.__getitem__, names))
        if undo is not None and not (undo.dtype == torch.float64 and undo.is_contiguous()):
            undo = undo.to(torch.float64).contiguous()
        left, right = list(map(self._left.__getitem__, order)), list(map(self._right.__getitem__, order))
        return _segment_statistics(self._matrices, self._known, undo, left, right, self._has_extremes, merged)

    def by_name(self) -> dict[str, Moments]:
        """Return each parameter's moments, ``(N,)``."""
        columns: dict[str, Moments] = {}
        if self.names:
            statistics = self.statistics(self.names)
            for name, column in zip(self.names, statistics[:, :-1].unbind(1), strict=True):
                columns[name] = chosen_moments(column, self._wanted)
        return columns


@operator(
    "(Tensor[] matrices, Tensor?[] known, Tensor? undo, int[] left, int[] right, bool extremes, bool merged) -> Tensor",
    lambda matrices, known, undo, left, right, extremes, merged: matrices[0].new_empty(
        len(ORDER), 1 if merged else len(left) + 1, len(matrices[0]), dtype=torch.float64
    ),
)
def _segment_statistics(
    matrices: Sequence[Tensor],
    known: Sequence[Tensor | None],
    undo: Tensor | None,
    left: Sequence[int],
    right: Sequence[int],
    extremes: bool,
    merged: bool,
) -> Tensor:
    """Return the moments in the order of ``ORDER``, for each parameter and then over all of them, ``(5, P + 1, N)``.

    Args:
        matrices: Each ``(N, D)``.
        known: Moments ``(N,)`` that were computed before, five for each parameter; ``None`` for those that are not wanted.
        undo: Factors of the entries, ``(N,)``.
        left: The number of each parameter's matrix, or of its left factor; ``-1 - i`` for the known moments of parameter ``i``.
        right: The number of its right factor, or -1.
        extremes: Whether to compute more than sums and sums of squares.
        merged: Whether to return only the moments over all parameters, ``(5, 1, N)``.
    """
    samples, segments, outputs = matrices[0].shape[0], len(matrices), len(left)
    out = torch.empty(len(ORDER), 1 if merged else outputs + 1, samples, dtype=torch.float64)
    alone = parallel_runner() is None or sum(map(Tensor.numel, matrices)) <= ONE_THREAD_ENTRIES
    numbers = array("q", map(Tensor.data_ptr, matrices))  # alive until the call returns
    numbers.extend([matrix.shape[1] for matrix in matrices])
    numbers.extend([matrix.stride(0) for matrix in matrices])
    numbers.extend(left)
    numbers.extend(right)
    steps = array("q")
    for column in known:
        numbers.append(0 if column is None else column.data_ptr())
        steps.append(0 if column is None else column.stride(0))
    numbers.extend(steps)
    x = numbers.buffer_info()[0]
    end = x + 8 * (3 * segments + 2 * outputs)
    job = SegmentJob(
        x=x,
        columns=x + 8 * segments,
        step=x + 16 * segments,
        left=x + 24 * segments,
        right=x + 24 * segments + 8 * outputs,
        known=end,
        known_step=end + 8 * len(known),
        undo=None if undo is None else undo.data_ptr(),
        out=out.data_ptr(),
        samples=samples,
        segments=segments,
        outputs=outputs,
        mode=int(extremes),
        merged=int(merged),
    )
    run = library_for(matrices[0].dtype, in_graph=True).segment_statistics
    run(ctypes.byref(job), parallel_runner(), 1 if alone else torch.get_num_threads())
    return out


def _is_double(column: Tensor) -> bool:
    return column.dtype == torch.float64 and column.is_cpu and column.ndim == 1


def chosen_moments(statistics: Tensor, wanted: Collection[Moment]) -> Moments:
    """Return the wanted moments of statistics ``(5, ...)`` in the order of ``ORDER``."""
    moments: Moments = {}
    for key, values in zip(ORDER, statistics.unbind(), strict=True):
        if key in wanted:
            moments[key] = values
    return moments
