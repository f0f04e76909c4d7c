"""Traces the basic operations of a forward pass and their dependences, to detect control flow that depends on data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradmetrics.engine.tracing.calls import PLAIN_TYPES, tensors_in
from lightning_gradmetrics.engine.tracing.masks import mask_marks
from lightning_gradmetrics.engine.tracing.origins import Origins
from lightning_gradmetrics.engine.tracing.outline import Recording
from lightning_gradmetrics.engine.tracing.schema import Schema, keeps_entries, schema_of, shows_memory

__all__ = [
    "DependenceTrace",
    "Operation",
    "choice_by_data",
    "finds_one_value",
    "hides_reads",
    "reads_activations",
    "selection_of_samples",
    "uses_totals",
]

SAMPLES, WEIGHTS = 1, 2
"""Bits that mark what a tensor depends on: samples or random numbers, and parameters."""

_INDEXING = frozenset(["index", "_unsafe_index", "index_put", "index_put_", "_unsafe_index_put", "_index_put_impl_"])
_ORDERING = ("sort", "argsort", "msort", "topk", "kthvalue", "median", "nanmedian", "mode", "cummax", "cummin")
_ALONG_INDEX = ("index_", "gather", "scatter", "take", "put")
_STRIDED = frozenset(["as_strided", "as_strided_"])
_UNIQUE = frozenset(["unique_consecutive", "unique_dim", "unique_dim_consecutive", "_unique", "_unique2"])
_BOUNDARIES = frozenset(["offs", "offsets", "lengths", "batch_sizes", "per_sample_weights"])


_CHECKING = frozenset(["aminmax", "min", "max", "_local_scalar_dense"])
"""Operations with which ``one_hot`` checks that every class is below the given number; its result does not depend on them."""


class Operation(NamedTuple):
    """One basic operation.

    Args:
        name: Its name.
        depends: The bits of all its arguments.
        inputs: The shapes of its tensor arguments.
        outputs: The shapes of its results.
        arguments: Its other arguments by name.
        chosen: Axes along which the operation selects positions, with the shape of the tensor.
        by_data: The reason why its shape or layout depends on data, if it does.
        read: Whether Python reads a value from it: ``""``, ``"float"`` or ``"other"``.
        input_serials: The serial numbers of its tensor arguments.
        output_serials: The serial numbers of its results.
        pointwise: Whether it works element by element.
        hidden: Whether no torch function of the model runs it, as in scripted code.
        memory: The memory of each tensor argument.
        written: The memory that it changes in place.
        marks: How many entries a mask selects at each position of the first axis, if it depends on the samples.
        made: The memory of its results.
    """

    name: str
    depends: int
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    arguments: Mapping[str, Any]
    chosen: tuple[tuple[tuple[int, ...], int], ...] = ()
    by_data: str = ""
    read: str = ""
    input_serials: tuple[int, ...] = ()
    output_serials: tuple[int, ...] = ()
    pointwise: bool = False
    hidden: bool = False
    memory: tuple[int, ...] = ()
    written: tuple[int, ...] = ()
    marks: tuple[int, ...] = ()
    made: tuple[int, ...] = ()


class DependenceTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records each basic operation while it is active.

    Args:
        samples: The tensors with samples.
        weights: The parameters.
        recording: The recording of torch functions that runs at the same time, if there is one.

    Attributes:
        hides_memory: Whether a tensor has no memory that its storage shows: sparse ones, subclasses with parts, zeros of forward mode.
        origins: Which tensors are results of the operations.
        alive: All tensors of the operations, and their storages.
    """

    def __init__(
        self, samples: Iterable[Tensor], weights: Iterable[Tensor], recording: Recording | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording, self.hides_memory = recording, False
        self.operations: list[Operation] = []
        self._bits: dict[int, int] = {}
        self.alive: list[Any] = []
        self._serials: dict[int, int] = {}
        samples = list(samples)
        self.samples = list(map(self.serial, samples))
        for bit, tensors in ((SAMPLES, samples), (WEIGHTS, weights)):
            self._mark(self.memory_of(tensors), bit)
        self.origins = Origins(self._bits)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: torch would import its compiler, which takes a second, to keep it away from this class."""
        return False

    def memory_of(self, tensors: Iterable[Tensor]) -> tuple[int, ...]:
        """Return the identities of the storages of tensors, which views share."""
        keys: list[int] = []
        with torch._C.DisableTorchFunction():
            for tensor in tensors:
                try:
                    storage = tensor.untyped_storage()
                    self.hides_memory |= not shows_memory(tensor)
                except RuntimeError:  # it has no storage
                    self.hides_memory = True
                    self.alive.append(tensor)
                    keys.append(id(tensor))
                    continue
                self.alive.append(storage)
                keys.append(storage._cdata)
        return tuple(keys)

    def _mark(self, memory: Iterable[int], bits: int) -> None:
        known = self._bits
        for key in memory:
            known[key] = known.get(key, 0) | bits

    def depends(self, value: Any) -> int:
        """Return the combined bits of all tensors in a nested value."""
        return self.bits_of(self.memory_of(tensors_in(value)))

    def bits_of(self, keys: Iterable[int]) -> int:
        """Return the combined bits of some memory."""
        bits = 0
        for key in keys:
            bits |= self._bits.get(key, 0)
        return bits

    def note_read(self, tensor: Tensor) -> None:
        """Record that Python reads the values of a tensor without an operation."""
        bits = self.depends(tensor)
        if bits:
            kind = "float" if tensor.is_floating_point() else "other"
            memory = self.memory_of([tensor])
            self.operations.append(Operation("read", bits, (tuple(tensor.shape),), (), {}, read=kind, memory=memory))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and record it."""
        kwargs = kwargs or {}
        schema = schema_of(func)
        if self.recording is not None and self.recording.only_checks and schema.name in _CHECKING:
            return func(*args, **kwargs)
        arguments = schema.bind(args, kwargs)
        plain, tensors = _parted(arguments)
        memory, serials = self.memory_of(tensors), tuple(map(self.serial, tensors))
        self.origins.read(schema.name, serials, memory)
        bits = self.bits_of(memory)
        if schema.is_random and arguments.get("dropout_p") != 0:
            bits |= SAMPLES
        shapes = _shapes(tensors)
        chosen, by_data, read = self._choices(schema, bits, arguments, tensors)
        if schema.name in _STRIDED:
            plain["keeps_entries"] = keeps_entries(arguments)
        marks = mask_marks(schema.name, arguments) if by_data else ()
        result = func(*args, **kwargs)
        outputs = list(tensors_in(result))
        made = self.memory_of(outputs)
        written: tuple[int, ...] = ()
        if schema.written:  # such an operation may replace the memory of a tensor
            written = self.memory_of(tensors_in([arguments.get(name) for name in schema.written]))
            memory = self.memory_of(tensors)
        if bits:
            self._mark((*made, *written), bits)
        self.origins.made.update(made)
        self.origins.watch(memory, tensors, made, outputs, written)
        operation = Operation(
            schema.name,
            bits,
            shapes,
            _shapes(outputs),
            plain,
            chosen,
            by_data,
            read,
            serials,
            tuple(map(self.serial, outputs)),
            schema.pointwise,
            self.recording is not None and self.recording.depth == 0,
            memory,
            written,
            marks,
            made,
        )
        self.operations.append(operation)
        return result

    def note_samples(self, tensors: Iterable[Tensor]) -> None:
        """Record that tensors depend on samples."""
        self._mark(self.memory_of(tensors), SAMPLES)

    def serial(self, tensor: Tensor) -> int:
        """Return the serial number of a tensor."""
        serial = self._serials.get(id(tensor))
        if serial is None:
            serial = self._serials[id(tensor)] = len(self._serials)
            self.alive.append(tensor)
        return serial

    def _choices(
        self, schema: Schema, bits: int, arguments: Mapping[str, Any], tensors: Sequence[Tensor]
    ) -> tuple[tuple[tuple[tuple[int, ...], int], ...], str, str]:
        """Return the axes that an operation selects along, why its shape depends on data, and the kind of value read from it."""
        name = schema.name
        if schema.reads_data and bits:
            return (), "", "float" if tensors[0].is_floating_point() and name != "equal" else "other"
        if name in _INDEXING:
            return (*self._indexed(name, arguments), "")
        if bits & SAMPLES and not schema.is_tagged_pointwise:
            return (*self._selected(schema, arguments), "")
        return (), "", ""

    def _indexed(self, name: str, arguments: Mapping[str, Any]) -> tuple[tuple[tuple[tuple[int, ...], int], ...], str]:
        """Return the axes that an operation like ``x[i, :, j]`` selects along, except by ``0, 1, 2, ...``."""
        shape = tuple(arguments["self"].shape)
        chosen, dim = [], 0
        for index in arguments["indices"]:
            if index is None:
                dim += 1
                continue
            if index.dtype in (torch.bool, torch.uint8):
                if self.depends(index) & SAMPLES:
                    sets_constant = "values" in arguments and not self.depends(arguments["values"])
                    return (), "" if sets_constant else f"{name} by a mask"
                for extra in range(index.ndim):
                    chosen.append((shape, dim + extra))
                dim += index.ndim
                continue
            if self.depends(index) & SAMPLES or not _counts_up(index, shape[dim]):
                chosen.append((shape, dim))
            dim += 1
        return tuple(chosen), ""

    def _selected(
        self, schema: Schema, arguments: Mapping[str, Any]
    ) -> tuple[tuple[tuple[tuple[int, ...], int], ...], str]:
        name = schema.name
        if schema.sizes_by_data:
            return (), name
        for key in _BOUNDARIES & arguments.keys():
            if self.depends(arguments[key]) & SAMPLES:
                return (), name
        first = arguments.get("self")
        if not isinstance(first, Tensor):
            return (), ""
        if name.startswith(("masked_scatter", "take", "put")):
            return (), name
        dim = arguments.get("dim", 0)
        ordered = name.startswith(_ORDERING) and isinstance(dim, int)
        index = arguments.get("index")
        picked = name.startswith(_ALONG_INDEX) and isinstance(index, Tensor) and isinstance(dim, int)
        if not first.ndim or not (ordered or picked):
            return (), ""
        dim %= first.ndim
        by_samples = self.depends(index) & SAMPLES
        if picked and not by_samples and isinstance(index, Tensor) and _counts_up(index, first.shape[dim]):
            return (), ""
        return ((tuple(first.shape), dim),), ""


def _shapes(tensors: Iterable[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(_SHAPE, tensors))


_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]


def _parted(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """Return the arguments without tensors and without packed weights, which cannot be compared; and all tensors, in order."""
    plain: dict[str, Any] = {}
    tensors: list[Tensor] = []
    for name, value in arguments.items():
        kind = type(value)
        if kind in PLAIN_TYPES:
            plain[name] = value
        elif kind is Tensor or kind is nn.Parameter:
            tensors.append(value)
        else:
            inside = list(tensors_in(value))
            tensors += inside
            if not inside and not isinstance(value, torch.ScriptObject):
                plain[name] = value
    return plain, tensors


def _counts_up(index: Tensor, length: int) -> bool:
    """Return whether an index is ``0, 1, ..., length - 1`` and therefore keeps the order."""
    flat = index.reshape(-1)
    return len(flat) == length and bool((flat == torch.arange(length, device=flat.device)).all())


_SORTING = frozenset(["sort", "index", "index_put_", "index_copy"])
_GROUPING = frozenset(["bincount", "_grouped_mm"])
"""Operations of mixtures of experts, which a proof may follow."""


def _names(operations: Sequence[Operation]) -> list[str]:
    return [operation.name for operation in operations]


def finds_one_value(operation: Operation) -> bool:
    """Return whether an operation finds that all values of a tensor are equal."""
    return operation.name in _UNIQUE and all(shape in ((), (0,), (1,)) for shape in operation.outputs)


def choice_by_data(two: Sequence[Operation], three: Sequence[Operation], strict: bool = True) -> str:
    """Return why the layout of a batch's rows may depend on the data; ``""`` if it cannot.

    Args:
        two: The operations with two samples.
        three: The operations with three samples.
        strict: Whether masks that select rows, values that are found to be equal, and sorts are reasons. A proof may show that the
            rows are those of all samples in order.
    """
    if _names(two) != _names(three):
        return "it runs different operations for three samples than for two"
    for small, large in zip(two, three, strict=True):
        is_provable = bool(small.marks and large.marks) or (finds_one_value(small) and finds_one_value(large))
        is_provable = is_provable or large.name in _GROUPING
        if (small.by_data or large.by_data) and (strict or not is_provable):
            return f"{small.by_data or large.by_data} chooses by data"
        for (before, dim), (after, _) in zip(small.chosen, large.chosen, strict=False):
            if before != after and before[dim] != after[dim] and (strict or large.name not in _SORTING):
                return f"{small.name} chooses along the sample axis"
        if len(small.chosen) != len(large.chosen):
            return f"{small.name} chooses by data"
        if large.read and large.depends & WEIGHTS and large.depends & SAMPLES:
            return "Python reads an activation"
        if large.read == "float" and large.depends & SAMPLES:
            return "Python reads a floating-point number that depends on the samples"
    return ""


_SELECTING = ("topk", "kthvalue", "median", "nanmedian", "mode")
"""Operations that select some positions of an axis by comparing all of them."""


def selection_of_samples(two: Sequence[Operation], three: Sequence[Operation]) -> str:
    """Return the operation that selects some samples of a batch by comparing them with the others; ``""`` if there is none.

    In a small batch the selection may be empty, as in ``topk(len(x) // 8)``, so comparing results would not reveal it.
    """
    for small, large in zip(two, three, strict=False):
        if not large.name.startswith(_SELECTING) or not large.depends & SAMPLES:
            continue
        for (before, dim), (after, _) in zip(small.chosen, large.chosen, strict=False):
            if before[dim] != after[dim] and large.arguments.get("k", 0) < after[dim]:
                return large.name
    return ""


def hides_reads(operations: Sequence[Operation]) -> bool:
    """Return whether a torch call reads a number of the samples itself, as in ``h[:, :longest]`` with a tensor."""
    following = [*operations[1:], None]
    for operation, after in zip(operations, following, strict=True):
        is_seen = operation.name == "read" or (after is not None and after.name == "read")
        if operation.read and operation.depends & SAMPLES and not is_seen:
            return True
    return False


def reads_activations(operations: Sequence[Operation]) -> bool:
    """Return whether Python reads a value that depends on the samples and on the parameters."""
    both = SAMPLES | WEIGHTS
    return any(operation.read and operation.depends & both == both for operation in operations)


def uses_totals(operations: Sequence[Operation]) -> bool:
    """Return whether a number that is computed from several positions of the samples meets a tensor with axes."""
    totals: set[int] = set()
    for operation in operations:
        is_number = bool(operation.outputs) and all(shape == () for shape in operation.outputs)
        reduces = is_number and bool(operation.depends & SAMPLES) and any(operation.inputs)
        if reduces or (is_number and totals.intersection(operation.input_serials)):
            totals.update(operation.output_serials)
        elif totals.intersection(operation.input_serials) and operation.outputs:
            return True
    return False
