"""The head's input at every position, as moments and as vectors: patches of its layers, mapped to the logits' grid.

If the operations after the head are linear, spatial and the same for every class, the gradient of one position's loss
with respect to the head's weight is the outer product ``g_u psi_u^T``. Here ``g_u`` is the gradient of the logits at
the position, and ``psi_u`` are the head's patches after the same operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_gradmetrics.classifier.carry import Carry
from lightning_gradmetrics.classifier.patches import Patches
from lightning_gradmetrics.gradients.precision import accumulator, at_least_float32
from lightning_gradmetrics.gradients.statistics import Moment, Moments, axis_moments

__all__ = ["Block", "HeadFeatures", "Term"]

BUDGET = 2**24
"""Largest number of entries of mapped features in memory at the same time."""

MOST_ENTRIES = 2**29
"""Largest number of entries of the feature vectors of all positions together."""


LINEAR = Patches()
"""The geometry of a linear layer."""


@dataclass(frozen=True)
class Term:
    """The input of one call of a layer, and the maps of its output.

    Args:
        input: ``(N, D, *Q)``.
        patches: The geometry of the layer.
        carries: The maps to the logits' grid, in order.
        share: The factor of the call in the logits.
        dtype: The type of all computations; by default that of the input.
    """

    input: Tensor
    patches: Patches = LINEAR
    carries: tuple[Carry, ...] = ()
    share: float = 1.0
    dtype: torch.dtype | None = None

    @property
    def wide_input(self) -> Tensor:
        """The input in the type of the computations."""
        return self.input if self.dtype is None else self.input.to(self.dtype)

    def carried(self, maps: Tensor) -> Tensor:
        """Map tensors from the layer's output grid to the logits' grid, ``(N, K, *P)``."""
        for carry in self.carries:
            maps = carry(maps)
        return maps

    def vectors(self, channels: slice) -> Tensor:
        """Return the mapped patches of some of the input's channels, ``(N, K, *P)``."""
        part = self.input[:, channels]
        carried = self.carried(self.patches.stacked(part if self.dtype is None else part.to(self.dtype)))
        return carried if self.share == 1 else self.share * carried

    @property
    def selects(self) -> bool:
        """Whether the features of every position are one unchanged patch."""
        return self.share == 1 and all(carry.selects for carry in self.carries)

    @property
    def is_nonnegative(self) -> bool:
        """Whether all inputs and all weights of the maps are at least zero."""
        if not all(carry.is_nonnegative for carry in self.carries):
            return False
        return self.share >= 0 and bool((self.input >= 0).all())

    def moment(self, key: Moment) -> Tensor:
        """Return a moment of the patch at every position of the layer's output grid, ``(N, 1, *Q)``."""
        own = axis_moments(self.input, [key], self.dtype)[key].to(self.dtype or self.input.dtype).unsqueeze(1)
        total: Tensor | None = None
        for tap in self.patches.taps(own):
            if total is None:
                total = tap
            elif key == "max":
                total = torch.maximum(total, tap)
            else:
                total = torch.minimum(total, tap) if key == "min" else total + tap
        assert total is not None
        return total


@dataclass(frozen=True)
class Block:
    """The features of one weight: the sum of the terms of its calls.

    Args:
        terms: The calls.
        group: The number of the group of channels and the number of groups; ``None`` if the weight has all classes.
    """

    terms: tuple[Term, ...]
    group: tuple[int, int] | None = None

    def of_output(self, output: Tensor) -> Tensor:
        """Return the channels of the logits' gradient ``(N, C, *P)`` that belong to the weight."""
        if self.group is None:
            return output
        number, groups = self.group
        return output.chunk(groups, 1)[number]

    @property
    def width(self) -> int:
        """The number of features ``D'``."""
        first = self.terms[0]
        return first.input.shape[1] * first.patches.count

    def moments(self, wanted: Iterable[Moment]) -> Moments:
        """Return moments over the features, ``(N, *P)`` each."""
        rest, out = set(wanted), {}
        selects = len(self.terms) == 1 and self.terms[0].selects
        is_nonnegative = selects or (1.0 in rest and all(term.is_nonnegative for term in self.terms))
        for key in tuple(rest):
            if selects or key == "sum" or (key == 1.0 and is_nonnegative):
                out[key] = self._carried_moment(key)
                rest.discard(key)
        if rest:
            out.update(self._moments_of_vectors(rest))
        return out

    def _carried_moment(self, key: Moment) -> Tensor:
        total: Tensor | None = None
        for term in self.terms:
            moment = term.share * term.carried(term.moment(key))
            total = moment if total is None else total + moment
        assert total is not None
        return total[:, 0].to(accumulator(total))

    def _moments_of_vectors(self, wanted: Iterable[Moment]) -> Moments:
        """Return moments of mapped patches, in blocks of channels."""
        totals: Moments = {}
        for vectors in self.vectors():
            for key, value in axis_moments(vectors, wanted).items():
                totals[key] = _merged(key, totals[key], value) if key in totals else value
        return totals

    def vectors(self) -> Iterator[Tensor]:
        """Yield the features ``(N, K, *P)`` in blocks of channels."""
        first = self.terms[0]
        single_feature = first.vectors(slice(0, 1))
        step = max(1, BUDGET // max(1, single_feature.numel()))
        for start in range(0, first.input.shape[1], step):
            channels = slice(start, start + step)
            total = first.vectors(channels)
            for term in self.terms[1:]:
                total = total + term.vectors(channels)
            yield total


def _merged(key: Moment, first: Tensor, second: Tensor) -> Tensor:
    if key == "max":
        return torch.maximum(first, second)
    return torch.minimum(first, second) if key == "min" else first + second


@dataclass(frozen=True)
class HeadFeatures:
    """The features that multiply the head's weight at every position, ``psi`` ``(N, D', *P)``, without storing it.

    Args:
        blocks: One block per weight, or per group of a grouped convolution.

    Example:
        >>> features = HeadFeatures.of(torch.tensor([[3.0, -4.0]]))
        >>> features.norm(2), features.dense()
        (tensor([5.], dtype=torch.float64), tensor([[ 3., -4.]]))
    """

    blocks: tuple[Block, ...]
    _known: dict[Moment, list[Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, features: Tensor, is_precise: bool = False) -> HeadFeatures:
        """Return the features of a tensor ``(N, D, *P)``.

        Args:
            features: The tensor.
            is_precise: Whether to compute as :meth:`precise` features do.
        """
        return cls((Block((_precise(Term(features)) if is_precise else Term(features),)),))

    @property
    def is_product(self) -> bool:
        """Whether every gradient is one outer product: the head has no groups of channels."""
        return all(block.group is None for block in self.blocks)

    @property
    def width(self) -> int:
        """The number of features ``D'`` at a position."""
        return sum(block.width for block in self.blocks)

    def block_moments(self, wanted: Iterable[Moment]) -> list[Moments]:
        """Return moments over the features of each block, ``(N, *P)``; each is computed once."""
        missing = [key for key in wanted if key not in self._known]
        if missing:
            computed = [block.moments(missing) for block in self.blocks]
            for key in missing:
                self._known[key] = [moments[key] for moments in computed]
        moments: list[Moments] = []
        for number in range(len(self.blocks)):
            moments.append({key: self._known[key][number] for key in wanted})
        return moments

    def moments(self, wanted: Iterable[Moment]) -> Moments:
        """Return moments over all features, ``(N, *P)``."""
        keys = tuple(wanted)
        return merged_moments(self.block_moments(keys))

    def norm(self, p: float = 2.0) -> Tensor:
        """Return the p-norm of the features at every position, ``(N, *P)``."""
        if math.isinf(p):
            ends = self.moments(("max", "min"))
            return torch.maximum(ends["max"], -ends["min"])
        return self.moments((float(p),))[float(p)].pow(1 / p)

    def dense(self) -> Tensor:
        """Return the features of every position, ``(N, D', *P)``.

        Raises:
            ValueError: If they do not fit into memory.
        """
        parts = []
        for block in self.blocks:
            single_feature = block.terms[0].vectors(slice(0, 1))
            count = single_feature.numel() // max(1, single_feature.shape[1]) * self.width
            if count > MOST_ENTRIES:
                raise ValueError(
                    f"the features of all positions are {count:.1e} numbers ({self.width} per position), too many to "
                    "store at once. Scores that use directions need smaller batches or smaller images; scores that use "
                    "norms, such as gradnorm and pseudo_label, do not"
                )
            parts += list(block.vectors())
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def rows(self, keep: Tensor) -> HeadFeatures:
        """Return the features of the samples that ``keep`` marks or lists."""
        return self._with_terms(lambda term: replace(term, input=term.input[keep]))

    def carried(self, carry: Carry) -> HeadFeatures:
        """Return the features after one more map of every channel."""
        blocks = []
        for block in self.blocks:
            terms = [replace(term, carries=(*term.carries, carry)) for term in block.terms]
            blocks.append(replace(block, terms=tuple(terms)))
        return HeadFeatures(tuple(blocks))

    def scaled(self, factor: float) -> HeadFeatures:
        """Return the features times a number."""
        return self._with_terms(lambda term: replace(term, input=factor * term.wide_input))

    def precise(self) -> HeadFeatures:
        """Return the features that are computed in float64 for samples, and in at least float32 for positions."""
        return self._with_terms(_precise)

    def _with_terms(self, change: Callable[[Term], Term]) -> HeadFeatures:
        blocks = []
        for block in self.blocks:
            blocks.append(replace(block, terms=tuple(map(change, block.terms))))
        return HeadFeatures(tuple(blocks))


def _precise(term: Term) -> Term:
    features = term.input.detach()
    if features.ndim > 2:
        return replace(term, input=at_least_float32(features))
    return replace(term, input=features, dtype=accumulator(features))


def merged_moments(parts: list[Moments]) -> Moments:
    """Merge the moments of several sets of entries."""
    total = dict(parts[0])
    for moments in parts[1:]:
        for key, value in moments.items():
            total[key] = _merged(key, total[key], value)
    return total
