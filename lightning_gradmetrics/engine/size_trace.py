"""Records the sizes in a forward pass, and shows that they differ between batches only by the number of samples.

A proof that a model keeps its samples apart is made from runs with two and with three samples. It holds for another batch if
the forward pass makes the same calls with the same constants, and if every size in them is that of the proof: constant, or
proportional to the number of samples.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_gradmetrics.engine.calls import SHAPING, tensors_in

__all__ = ["SizeRecord", "SizeTrace", "size_record"]

_FILLING = frozenset(["full", "new_full"])
"""Functions whose plain numbers are values of the result, and whose tuples are its shape."""

MOST_SHAPES = 256
"""Largest number of input shapes whose sizes are kept."""


class SizeTrace(TorchFunctionMode):
    """Records every torch call inside the block.

    Attributes:
        skeleton: A number for the calls and their constants.
        sizes: Every integer that may be a size: those of functions that set a shape, and the shapes of all results.
        depth: How many recorded calls are running.
        has_hooks: Whether the forward pass registers hooks on tensors, which may change gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.skeleton = self.depth = 0
        self.sizes: list[int] = []
        self.has_hooks = False
        self._made: dict[int, ReferenceType[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call and record it if it returns or changes tensors."""
        kwargs = kwargs or {}
        if (
            type(func) is torch._ops.OpOverload
        ):  # made by no torch function of the model, or repeated by a dispatch mode
            return func(*args, **kwargs)
        self.depth += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self.depth -= 1
        name = getattr(func, "__name__", "")
        self.has_hooks = self.has_hooks or name in ("register_hook", "retain_grad")
        outputs = list(tensors_in(result))
        if (outputs or result is None) and name != "_assert":
            self._record(func, name, (*args, *kwargs.values()), kwargs.keys(), outputs)
        for output in outputs:
            self._made[id(output)] = ref(output)
        return result

    def _record(
        self, func: Any, name: str, values: tuple[Any, ...], names: Iterable[str], outputs: Sequence[Tensor]
    ) -> None:
        constants: list[Hashable] = [self.skeleton, func, *names]
        # A number computed from the whole batch may be compared with the batch size, as in mask.sum() == mask.numel().
        of_numbers = bool(outputs) and not any(tensor.ndim for tensor in (*tensors_in(values), *outputs))
        for value in values:
            fills = name in _FILLING and not isinstance(value, (tuple, list))
            self._add(value, constants, of_numbers or (name in SHAPING and not fills))
        for output in outputs:
            constants.append(output.ndim)
            self.sizes += output.shape
        self.skeleton = hash(tuple(constants))

    def _add(self, value: Any, constants: list[Hashable], is_size: bool) -> None:
        """Add an argument to the sizes or to the constants."""
        kind = type(value)
        if isinstance(value, Tensor):  # a tensor that no recorded call made may come from scripted code
            made = self._made.get(id(value))
            constants.append(made is not None and made() is value)
        elif kind is int and is_size:
            self.sizes.append(value)
        elif kind is slice:
            for end in (value.start, value.stop, value.step):
                self._add(end, constants, is_size)
        elif isinstance(value, (tuple, list)):
            constants.append(len(value))
            for entry in value:
                self._add(entry, constants, is_size)
        elif isinstance(value, dict):
            for key, entry in value.items():
                constants.append(str(key))
                self._add(entry, constants, is_size)
        else:
            content = getattr(value, "tobytes", None)  # an array of numpy
            constants.append((kind, content() if content is not None else repr(value)))

    def units(self, grows: Iterable[bool], samples: int) -> tuple[int, ...] | None:
        """Return the sizes for one sample; ``None`` if a size that grows with the samples is not a multiple of their number.

        Args:
            grows: For each size, whether it is proportional to the number of samples.
            samples: The number of samples of the recorded run.
        """
        units = []
        for size, is_proportional in zip(self.sizes, grows, strict=False):
            if is_proportional and size % samples:
                return None
            units.append(size // samples if is_proportional else size)
        return tuple(units) if len(units) == len(self.sizes) else None


@dataclass(frozen=True)
class SizeRecord:
    """The sizes for which a proof is known to hold.

    Args:
        skeleton: The number of the calls and their constants.
        grows: For each size, whether it is proportional to the number of samples.
        units: For each shape of the inputs, the sizes for one sample.
    """

    skeleton: int
    grows: tuple[bool, ...]
    units: dict[Hashable, tuple[int, ...]] = field(default_factory=dict)

    def covers(self, trace: SizeTrace, samples: int, shapes: Hashable) -> bool:
        """Return whether a forward pass of a batch is covered by the proof, for shapes of the inputs that are known."""
        known = self.units.get(shapes)
        return known is not None and trace.skeleton == self.skeleton and trace.units(self.grows, samples) == known

    def learn(self, trace: SizeTrace, samples: int, alone: SizeTrace, shapes: Hashable) -> bool:
        """Add new shapes of the inputs, if one sample alone shows that the sizes of a batch grow as in the proof.

        Axes of length 1, which torch broadcasts, must be those of the proof.

        Args:
            trace: The forward pass of a batch.
            samples: Its number of samples.
            alone: The forward pass of one of its samples.
            shapes: The shapes of the inputs.
        """
        if not trace.skeleton == alone.skeleton == self.skeleton:
            return False
        units = trace.units(self.grows, samples)
        known = next(iter(self.units.values()))
        if units is None or units != alone.units(self.grows, 1) or _ones(units) != _ones(known):
            return False
        while len(self.units) >= MOST_SHAPES:
            del self.units[next(reversed(self.units))]
        self.units[shapes] = units
        return True


def _ones(sizes: Iterable[int]) -> list[bool]:
    return [size == 1 for size in sizes]


def size_record(two: SizeTrace, three: SizeTrace, shapes: Hashable) -> SizeRecord | None:
    """Return the record of a proof from its runs with two and with three samples; ``None`` if sizes grow in another way.

    Args:
        two: The run with two samples.
        three: The run with three samples.
        shapes: The shapes of the inputs.
    """
    if two.skeleton != three.skeleton or len(two.sizes) != len(three.sizes) or two.has_hooks or three.has_hooks:
        return None
    grows = tuple(small != large for small, large in zip(two.sizes, three.sizes, strict=True))
    units = three.units(grows, 3)
    if units is None or units != two.units(grows, 2):
        return None
    return SizeRecord(three.skeleton, grows, {shapes: units})
