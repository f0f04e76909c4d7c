"""Values that Python reads from tensors in a forward pass, and the samples that would read something else alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.classifier.tensor_records import version_of
from lightning_gradmetrics.engine.tracing.calls import HOST_READS, tensors_in
from lightning_gradmetrics.engine.tracing.layouts import Layout

__all__ = ["READING", "HostRead", "PlannedRead", "ReadWatch", "Reductions", "host_value", "tensors_read"]

_CONVERTING = frozenset(["tensor", "as_tensor", "asarray", "new_tensor", "Tensor"])
"""Names of functions that read the numbers in a list."""

READING = HOST_READS | _CONVERTING
"""Names of all functions that read values of tensors."""


def tensors_read(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> tuple[list[Tensor], Any]:
    """Return the tensors whose values a call reads, and the value that Python gets.

    Args:
        function: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        result: What it returned.
    """
    name = getattr(function, "__name__", "")
    if name in HOST_READS:
        return list(tensors_in((args, kwargs)))[:1], result
    if name not in _CONVERTING:
        return [], None
    lists = [value for value in (*args, *kwargs.values()) if isinstance(value, (list, tuple))]
    return list(tensors_in(lists)), ()


_BY_ROW: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda rows: rows.all(1),
    "any": lambda rows: rows.any(1),
    "max": lambda rows: rows.amax(1),
    "amax": lambda rows: rows.amax(1),
    "min": lambda rows: rows.amin(1),
    "amin": lambda rows: rows.amin(1),
    "sum": lambda rows: rows.sum(1),
}
"""For each reduction to one number, the same reduction of each row."""


@dataclass(frozen=True)
class Reduction:
    """A number that was computed from a tensor.

    Args:
        name: The reduction.
        source: The tensor.
        number: The result.
        count: The integer that the sum was compared with, as in ``mask.sum() == mask.numel()``.
        versions: The versions of both tensors; zero for a number that is none.
        element: The number that was searched for, as in ``0 in tokens``.
    """

    name: str
    source: Tensor
    number: Tensor | bool
    count: int | None = None
    versions: tuple[int, int] = (0, 0)
    element: float | None = None

    @property
    def is_current(self) -> bool:
        """Whether neither tensor was changed in place since."""
        version = version_of(self.number) if isinstance(self.number, Tensor) else 0
        return self.versions == (version_of(self.source), version)

    def of_samples(self, layout: Layout, size: int, count: int | None) -> Tensor | None:
        """Return the value of each sample alone, ``(N,)``; ``None`` if it is not known.

        Args:
            layout: Where the samples are in the source.
            size: Their number.
            count: The integer that the sum of one sample alone is compared with.
        """
        positions = layout.outer * layout.inner
        if self.source.shape[layout.dim] != size * positions or not self.is_current:
            return None
        axes = self.source.detach().movedim(layout.dim, 0)
        split = axes.unflatten(0, (layout.outer, size, layout.inner))  # type: ignore[no-untyped-call]
        rows = split.movedim(1, 0).flatten(1)
        values = _BY_ROW[self.name](rows if self.element is None else rows == self.element)
        return values if count is None else values == count


class Reductions:
    """Remembers the numbers that calls computed from tensors."""

    def __init__(self) -> None:
        self._known: dict[int, Reduction] = {}

    def add(self, function: Any, args: Sequence[Any], result: Any) -> None:
        """Remember a call if it reduces a tensor to a number, or compares such a number with an integer."""
        if not isinstance(result, Tensor) or result.ndim:
            return
        name = getattr(function, "__name__", "")
        known = self._known.get(id(result))
        if known is not None and known.number is result:  # changed in place
            del self._known[id(result)]
        if name in _BY_ROW and len(args) == 1 and isinstance(args[0], Tensor):
            versions = version_of(args[0]), version_of(result)
            self._known[id(result)] = Reduction(name, args[0], result, None, versions)
        elif name in ("__eq__", "eq") and len(args) == 2 and type(args[1]) is int:
            before = self._known.get(id(args[0]))
            if before is not None and before.name == "sum" and before.count is None and before.is_current:
                versions = before.versions[0], version_of(result)
                self._known[id(result)] = replace(before, number=result, count=args[1], versions=versions)

    def of_read(self, function: Any, args: Sequence[Any], tensor: Tensor, result: Any) -> Reduction | None:
        """Return the reduction whose result a call reads, if it is known: that of a tensor, or the call itself, as in ``0 in tokens``."""
        if function is not Tensor.__contains__:
            return self._known.get(id(tensor))
        if len(args) != 2 or type(args[1]) not in (bool, int, float):
            return None
        return Reduction("any", tensor, result, element=args[1], versions=(version_of(tensor), 0))


def host_value(result: Any) -> Any:
    """Return a value read by Python, in a form that can be compared: its type only where the values are not copied."""
    if not isinstance(result, (list, tuple, str, bool, int, float, complex)) and not hasattr(result, "tobytes"):
        return type(result).__name__
    if isinstance(result, (list, tuple)):
        return repr(result)
    tobytes = getattr(result, "tobytes", None)
    return tobytes() if tobytes is not None else result


@dataclass(frozen=True)
class HostRead:
    """A value that Python read from a tensor.

    Args:
        value: The value.
        calls: The number of traced calls before it.
        tensor: The tensor.
        reduction: How it was computed from another tensor, if that is known.
    """

    value: Any
    calls: int
    tensor: Tensor
    reduction: Reduction | None


@dataclass(frozen=True)
class PlannedRead:
    """A value that a plan expects Python to read.

    Args:
        value: The value.
        by_samples: Whether it depends on the samples.
        layout: Where the samples are in the tensor that was reduced to the value; ``None`` if that is not known.
        grows: Whether the integer that a sum is compared with is proportional to the number of samples; ``None`` if there is
            none, or if that is not known.
    """

    value: Any
    by_samples: bool = True
    layout: Layout | None = None
    grows: bool | None = None


class ReadWatch:
    """Compares what Python reads with a plan, and finds the samples that would read something else if they were alone.

    Args:
        planned: The planned reads, in order; ``None`` accepts any.
        size: The number of samples.
    """

    def __init__(self, planned: Sequence[PlannedRead] | None, size: int) -> None:
        self.planned, self.size = planned, size
        self._seen = 0
        self._differing: Tensor | None = None
        self._any_sample = False
        self.reductions = Reductions()

    def matches(self, result: Any, reduction: Reduction | None) -> bool:
        """Return whether a value is the next planned one, and note the samples for which it would be different.

        Args:
            result: The value.
            reduction: How it was computed from a tensor, if that is known.
        """
        planned = self.planned or ()
        if self._seen >= len(planned) or planned[self._seen].value != host_value(result):
            return False
        read = planned[self._seen]
        self._seen += 1
        if read.by_samples and self.size > 1:
            self._note_samples(read, reduction)
        return True

    def _note_samples(self, read: PlannedRead, reduction: Reduction | None) -> None:
        if reduction is None or read.layout is None or not self._is_comparable(read, reduction):
            self._any_sample = True
            return
        count = reduction.count
        with torch._C.DisableTorchFunction(), torch.no_grad():
            own = reduction.of_samples(read.layout, self.size, count // self.size if count and read.grows else count)
            if own is None:
                self._any_sample = True
                return
            differing = own != reduction.number
        self._differing = differing if self._differing is None else self._differing | differing

    def _is_comparable(self, read: PlannedRead, reduction: Reduction) -> bool:
        """Return whether the number for one sample alone is known; a total may be compared with the size of the batch later."""
        if reduction.name != "sum":
            return True
        count = reduction.count
        return count is not None and read.grows is not None and not (read.grows and count % self.size)

    def differing(self) -> list[int]:
        """Return the samples that would read another value alone; all samples if that is not known."""
        if self._any_sample:
            return list(range(self.size))
        if self._differing is None:
            return []
        numbers: list[int] = self._differing.nonzero().flatten().tolist()
        return numbers
