"""Finds tensors that no traced operation has made, such as results of another thread."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import Tensor

__all__ = ["FIRST_USES", "Origins"]

FIRST_USES = frozenset(["lift_fresh", "lift_fresh_copy", "lift"])
"""Operations that return a tensor that Python made from numbers."""


class Origins:
    """Which memory belongs to results of operations, and which arguments have other memory.

    Args:
        known: The memory of the samples and of the weights.

    Attributes:
        made: The memory of the samples, of the weights and of all results.
        strangers: The memory of each other argument, by serial number.
        changed: Whether something else than the operations has changed a tensor in place.

    Example:
        >>> origins = Origins([7])
        >>> origins.read("mul", [0, 1], [7, 8])
        >>> origins.strangers
        {1: 8}
    """

    def __init__(self, known: Iterable[int]) -> None:
        self.made = set(known)
        self.strangers: dict[int, int] = {}
        self.changed = False
        self._versions: dict[int, dict[int, int]] = {}

    def read(self, name: str, serials: Iterable[int], memory: Iterable[int]) -> None:
        """Note the arguments of an operation.

        Args:
            name: The name of the operation.
            serials: The serial numbers of its tensor arguments.
            memory: Their memory.
        """
        for serial, key in zip(serials, memory, strict=True):
            if key not in self.made and name not in FIRST_USES:
                self.strangers[serial] = key

    def watch(
        self,
        memory: Sequence[int],
        used: Sequence[Tensor],
        made: Sequence[int],
        results: Sequence[Tensor],
        written: Collection[int],
    ) -> None:
        """Compare the versions of the arguments of an operation with those at their last use.

        Args:
            memory: The memory of each argument.
            used: The arguments.
            made: The memory of each result.
            results: The results. A view gets the version of its argument after the operation.
            written: The memory that the operation changes in place, after which versions are unknown.
        """
        for key in written:
            self._versions.pop(key, None)
        self._compare(memory, used, written)
        self._compare(made, results, {*written, *memory})

    def _compare(self, memory: Sequence[int], tensors: Sequence[Tensor], left_out: Collection[int]) -> None:
        """Compare the versions of tensors with those at their last use, and note them at the first."""
        for key, tensor in zip(memory, tensors, strict=True):
            if key in left_out or tensor.is_inference():
                continue
            versions = self._versions.setdefault(key, {})
            self.changed |= versions.setdefault(id(tensor), tensor._version) != tensor._version
