"""What a proof knows of the tensors and the memory of a forward pass: facts that hold for any number of samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from lightning_gradmetrics.engine.tracing.dependence import Operation
from lightning_gradmetrics.engine.tracing.layouts import Layout

__all__ = [
    "Constant",
    "Counts",
    "Ends",
    "Equal",
    "Facts",
    "Inverse",
    "Memory",
    "Number",
    "Places",
    "Range",
    "Repeated",
    "Samples",
    "Sort",
    "SortInteger",
    "TensorFact",
    "Varying",
    "is_constant",
    "layout_in",
    "varies",
]


@dataclass(frozen=True)
class Sort:
    """A sort of all entries of a tensor with one axis.

    Args:
        order: The serial number of its indices, which is also the number of the order.
        source: The serial number of the sorted tensor.
        layout: Where the samples are in that tensor.
        ascending: Whether the keys ascend.
    """

    order: int
    source: int
    layout: Layout
    ascending: bool


@dataclass(frozen=True)
class Samples:
    """A tensor with entries of each sample.

    Args:
        layout: Where they are.
        keys_of: The sort of which these are the sorted keys, if they are.
    """

    layout: Layout
    keys_of: Sort | None = None


@dataclass(frozen=True)
class Constant:
    """A tensor with the same shape and values for any number of samples."""


@dataclass(frozen=True)
class Repeated:
    """A constant that is repeated for each sample.

    Args:
        layout: Where the entries for each sample are.
    """

    layout: Layout


@dataclass(frozen=True)
class Equal:
    """A constant whose shape grows with the number of samples, and whose entries are all equal.

    Args:
        layout: Where the entries for each sample are; ``None`` if more than one axis grows.
    """

    layout: Layout | None


@dataclass(frozen=True)
class Range:
    """The tensor ``0, 1, ...``, whose length grows with the number of samples.

    Args:
        counts_samples: Whether the length is that number.
        is_whole: Whether it has one axis with all entries.
    """

    counts_samples: bool
    is_whole: bool


@dataclass(frozen=True)
class Varying:
    """A tensor whose values may depend on the number of samples, or on the place of a sample among them."""


@dataclass(frozen=True)
class Number:
    """A number that is computed from all samples."""


@dataclass(frozen=True)
class Places:
    """For each sorted row the place in the tensor that was sorted, divided by an integer.

    Args:
        sort: The sort.
        divisor: The integer.
    """

    sort: Sort
    divisor: int


@dataclass(frozen=True)
class Inverse:
    """For each row its place among the sorted ones.

    Args:
        sort: The sort.
    """

    sort: Sort


@dataclass(frozen=True)
class Counts:
    """The number of entries for each key.

    Args:
        source: The serial number of the tensor with the keys, as it was before a sort.
    """

    source: int


@dataclass(frozen=True)
class Ends:
    """The places where the entries of each key end after a sort.

    Args:
        source: The serial number of the tensor with the keys, as it was before a sort.
    """

    source: int


SortInteger = Places | Inverse | Counts | Ends
"""Integers that follow from a sort, each of which depends on all samples."""

TensorFact = Samples | Constant | Repeated | Equal | Range | Varying | Number | SortInteger
"""What is known of one tensor. Nothing is known of parameters, buffers and other tensors that no operation has returned."""


def layout_in(fact: TensorFact | None) -> Layout | None:
    """Return where the entries for each sample are, in a tensor with samples or with constants."""
    return fact.layout if isinstance(fact, Samples | Repeated | Equal) else None


def is_constant(fact: TensorFact | None) -> bool:
    """Return whether a tensor has the same values for each sample, and for any number of them."""
    return isinstance(fact, Constant | Repeated | Equal)


def varies(fact: TensorFact | None) -> bool:
    """Return whether values depend on the number of samples, except for a range that counts them."""
    return isinstance(fact, Varying) or (isinstance(fact, Range) and not fact.counts_samples)


@dataclass
class Memory:
    """What has happened to one piece of memory, which several tensors may share.

    Args:
        written: Samples, or values that depend on their number, were written into it.
        in_place: All such writes put each sample in its own place, so that other tensors with this memory keep their layouts.
        shared: All samples share its entries, as after ``expand``.
        grows: Its size grows with the number of samples.
        changed: It was changed in place, so that entries that were equal may differ.
        fixed: It contains integers of a sort, which nothing may change.
    """

    written: bool = False
    in_place: bool = False
    shared: bool = False
    grows: bool = False
    changed: bool = False
    fixed: bool = False


@dataclass
class Facts:
    """What is known of the tensors and of the memory of a forward pass.

    Args:
        tensors: The fact of each tensor, by serial number.
        memories: The state of each piece of memory, by its identity.
    """

    tensors: dict[int, TensorFact]
    memories: defaultdict[int, Memory] = field(default_factory=lambda: defaultdict(Memory))

    def of(self, serials: Iterable[int]) -> list[TensorFact | None]:
        """Return the facts of some tensors."""
        return [self.tensors.get(serial) for serial in serials]

    def set(self, serials: Iterable[int], fact: TensorFact) -> None:
        """Note one fact of some tensors."""
        self.tensors.update(dict.fromkeys(serials, fact))

    def samples(self, serials: Iterable[int]) -> list[Layout | None]:
        """Return where the samples are in some tensors; ``None`` for tensors without samples."""
        layouts: list[Layout | None] = []
        for fact in self.of(serials):
            layouts.append(fact.layout if isinstance(fact, Samples) else None)
        return layouts

    def memory(self, keys: Iterable[int]) -> list[Memory]:
        """Return the states of some pieces of memory."""
        return [self.memories[key] for key in keys]

    def note_written(self, operation: Operation) -> None:
        """Note that an operation writes values of samples, or such that depend on their number."""
        for memory in self.memory(operation.written):
            memory.written = True

    def note_changed(self, operation: Operation) -> None:
        """Note that an operation may change entries so that they differ."""
        for memory in self.memory(operation.written):
            memory.changed = True
