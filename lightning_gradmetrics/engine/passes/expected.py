"""The moments of autograd's gradients of one sample, with which those of the engine are compared.

They are computed by torch alone: a kernel of the engine could repeat its own error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.reference import loss_gradients
from lightning_gradmetrics.engine.uses import merge_rows
from lightning_gradmetrics.gradients.lost_digits import may_have_lost
from lightning_gradmetrics.gradients.precision import rounding
from lightning_gradmetrics.gradients.statistics import (
    EXTREMES,
    Moment,
    Moments,
    gradient_moments,
    merged_moments,
    stacked_moments,
)

__all__ = ["BLOCK", "SMALL", "Expected", "consumed"]

BLOCK = 2**17
"""Number of entries of which moments are computed at once: temporary tensors of this size stay in the processor's caches."""

SMALL = 2**13
"""Largest number of entries of a gradient whose moments are computed together with those of others."""

MOST_TOGETHER = 64
"""Largest number of such gradients."""

_USUAL = frozenset[Moment](["sum", "max", "min", 1.0, 2.0])
"""Moments for which there are faster ways of the same precision."""


@dataclass(frozen=True)
class Expected:
    """The moments of autograd's gradients of one sample.

    Args:
        moments: Those of each parameter, ``(P,)``.
        entries: The number of entries of each parameter.
        rounding: The relative rounding error of each parameter.
    """

    moments: Moments
    entries: list[int]
    rounding: list[float]

    @classmethod
    def of(
        cls, gradients: Iterable[Tensor], wanted: Iterable[Moment], known: Mapping[int, Moments] | None = None
    ) -> Expected:
        """Return the moments of each gradient, with the squares; an iterator may delete each gradient before it yields the next.

        Args:
            gradients: The gradients.
            wanted: The moments.
            known: Moments ``(1,)`` that were computed before, by the number of the gradient, which then has no values.
        """
        entries: list[int] = []
        by_rounding: list[float] = []

        def noted() -> Iterator[Tensor]:
            for gradient in gradients:
                entries.append(max(gradient.numel(), 1))
                by_rounding.append(rounding(gradient))
                yield gradient

        moments = _moments_of_each(noted(), {*wanted, 2.0}, known or {})
        return cls(moments, entries, by_rounding)

    @classmethod
    def of_loss(cls, loss: Tensor, parameters: Sequence[Tensor], wanted: Iterable[Moment]) -> Expected:
        """Return the moments of the gradients of a scalar, with the squares.

        Large gradients are reduced and freed as they arrive, while they are in the processor's caches. All of them together take
        as much memory as the parameters, and getting new memory from the system takes as long as computing a large gradient.
        """
        keys = {*wanted, 2.0}
        with _Arrivals(parameters, keys) as arrivals:
            gradients = loss_gradients(loss, parameters)
        known = arrivals.reduced(gradients)
        if known is None:
            known, gradients = {}, loss_gradients(loss, parameters)
        return cls.of(consumed(gradients), keys, known)

    def norms(self) -> list[float]:
        """Return the norm of each gradient."""
        norms: list[float] = self.moments[2.0].sqrt().tolist()
        return norms


def consumed(gradients: list[Tensor], factor: float = 1.0) -> Iterator[Tensor]:
    """Yield each gradient times the factor, and delete it from the list."""
    gradients.reverse()
    while gradients:
        gradient = gradients.pop()
        yield gradient if factor == 1 else gradient * factor


class _Arrivals:
    """Computes the moments of large gradients when they arrive at their parameters, inside the block.

    A hook on each large parameter replaces its gradient by a tensor without memory. Parameters with hooks are left out. No hook
    remains.

    Args:
        parameters: The parameters.
        wanted: The moments.
    """

    def __init__(self, parameters: Sequence[Tensor], wanted: Set[Moment]) -> None:
        self._parameters, self._wanted = parameters, wanted
        self._hooked: dict[int, Any] = {}
        self._moments: dict[int, Moments] = {}
        self._stand_ins: dict[int, Tensor] = {}
        self._is_repeated = False

    def __enter__(self) -> _Arrivals:
        for number, parameter in enumerate(self._parameters):
            if parameter.numel() > BLOCK and parameter.requires_grad and not parameter._backward_hooks:
                self._hooked[number] = parameter._backward_hooks
                parameter.register_hook(partial(self._reduce, number))  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, hooks in self._hooked.items():
            self._parameters[number]._backward_hooks = hooks

    def _reduce(self, number: int, gradient: Tensor | None) -> Tensor | None:
        """Return a tensor without memory instead of a gradient whose moments are now known."""
        if number in self._stand_ins:
            self._is_repeated = True
        if type(gradient) is not Tensor or gradient.layout is not torch.strided or self._is_repeated:
            return None
        self._moments[number] = _moments_by_blocks(gradient, self._wanted)
        stand_in = self._stand_ins[number] = gradient.new_zeros(()).expand(gradient.shape)
        return stand_in

    def reduced(self, gradients: Sequence[Tensor]) -> dict[int, Moments] | None:
        """Return the moments by the number of the parameter; ``None`` if another backward pass, inside of this one, got a stand-in."""
        for number, stand_in in self._stand_ins.items():
            if gradients[number] is not stand_in:
                return None
        return None if self._is_repeated else self._moments


# -- reductions -------------------------------------------------------------------------------------------------------


def _moments_of_each(gradients: Iterable[Tensor], wanted: Set[Moment], known: Mapping[int, Moments]) -> Moments:
    """Return the moments ``(P,)`` of some gradients; those of small ones are computed together."""
    parts: list[Moments] = []
    order: list[int] = []
    small: defaultdict[torch.dtype, dict[int, Tensor]] = defaultdict(dict)
    for number, gradient in enumerate(gradients):
        if number in known or not _is_small(gradient, wanted):
            parts.append(known[number] if number in known else _moments_by_blocks(gradient, wanted))
            order.append(number)
            continue
        together = small[gradient.dtype]
        together[number] = gradient
        if len(together) == MOST_TOGETHER:
            parts.append(_moments_of_small(list(together.values()), wanted))
            order += together
            together.clear()
    for together in small.values():
        if together:
            parts.append(_moments_of_small(list(together.values()), wanted))
            order += together
    positions = torch.tensor(order).argsort()
    return {key: value[positions] for key, value in merge_rows(parts).items()}


def _is_small(gradient: Tensor, wanted: Set[Moment]) -> bool:
    is_plain = gradient.is_cpu and gradient.layout is torch.strided and gradient.dtype in (torch.float32, torch.float64)
    return is_plain and 0 < gradient.numel() <= SMALL and _USUAL.issuperset(wanted)


def _moments_of_small(gradients: Sequence[Tensor], wanted: Iterable[Moment]) -> Moments:
    """Return the moments ``(P,)`` of small gradients of one type, by a few calls for all of them."""
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).double()
    lengths = torch.tensor(list(map(Tensor.numel, gradients)))
    entries: dict[Moment, Tensor] = {1.0: flat.abs(), 2.0: flat * flat}
    moments: Moments = {}
    for key in wanted:
        kind = key if isinstance(key, str) else "sum"
        moments[key] = torch.segment_reduce(entries.get(key, flat), kind, lengths=lengths, unsafe=True)
    return moments


def _moments_by_blocks(gradient: Tensor, wanted: Set[Moment]) -> Moments:
    """Return the moments ``(1,)`` of one gradient, without temporary tensors of its size."""
    flat = _in_memory_order(gradient).reshape(-1)
    if gradient.is_cpu and gradient.dtype in (torch.float32, torch.float64) and _USUAL.issuperset(wanted):
        found = _usual_moments(flat, wanted)
        if not may_have_lost(found[2.0]):
            return found
    parts = [gradient_moments(block[None], wanted) for block in torch.split(flat, BLOCK)]
    return parts[0] if len(parts) == 1 else merged_moments(stacked_moments(parts))


def _usual_moments(flat: Tensor, wanted: Set[Moment]) -> Moments:
    """Return the usual moments ``(1,)`` of entries ``(D,)``; each block is read from memory once."""
    keys = tuple(wanted)
    rows: list[Tensor] = []
    for block in torch.split(flat, BLOCK):
        moments: Moments = {2.0: block.dot(block)}
        if not wanted.isdisjoint(EXTREMES):  # aminmax takes longer than both
            moments |= {"min": block.amin(), "max": block.amax()}
        if "sum" in wanted:
            moments["sum"] = block.sum()
        if 1.0 in wanted:
            moments[1.0] = block.abs().sum()
        rows.append(torch.stack([moments[key] for key in keys]))
    if len(rows) == 1:
        return dict(zip(keys, rows[0].double()[None].unbind(1), strict=True))
    return merged_moments(dict(zip(keys, torch.stack(rows).double()[None].unbind(2), strict=True)))


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Return the tensor with its axes in the order of its memory, so that flattening a transposed one needs no copy."""
    if tensor.is_contiguous():
        return tensor
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
