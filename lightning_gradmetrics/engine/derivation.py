"""Uses of tensors that a model computes from parameters alone, pulled back to these parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels import row_moments
from lightning_gradmetrics.engine.kernels.reduction import CHUNK_ENTRIES
from lightning_gradmetrics.engine.selection import rearranges, selection_of
from lightning_gradmetrics.engine.uses import EmbeddingUse, RowsUse, StackedUse, Use, flat_rows, merge_rows
from lightning_gradmetrics.gradients.statistics import Moment, Moments

__all__ = ["Derivation", "DerivedUse", "pulled_back"]


@dataclass(frozen=True)
class Derivation:
    """The gradients of a tensor that was computed from parameters alone, and one backward pass for all of these parameters.

    Args:
        use: The use of the derived tensor.
        derived: The derived tensor, with its graph.
        parameters: The leaves of that graph.
    """

    use: Use
    derived: Tensor
    parameters: tuple[Tensor, ...]
    _found: dict[frozenset[Moment], list[Moments]] = field(default_factory=dict)

    def rows(self, start: int, stop: int) -> Derivation:
        """Return the derivation for some of the samples."""
        return Derivation(self.use.rows(start, stop), self.derived, self.parameters)

    def gradients(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return each sample's gradients of some of the parameters, ``(N, *shape)`` each."""
        outer = self.use.gradient().to(self.derived.dtype)
        pulled = torch.autograd.grad(
            self.derived, parameters, [outer], retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        gradients: list[Tensor] = []
        for parameter, gradient in zip(parameters, pulled, strict=True):
            gradients.append(parameter.new_zeros(len(self.use), *parameter.shape) if gradient is None else gradient)
        return gradients

    def moments(self, parameter: Tensor, wanted: Iterable[Moment]) -> Moments:
        """Return the moments of the gradients of one parameter; those of all others are computed with them, and kept."""
        keys = frozenset(wanted)
        if keys not in self._found:
            self._found[keys] = self._all_moments(keys)
        numbers = list(map(id, self.parameters))
        return self._found[keys][numbers.index(id(parameter))]

    def _all_moments(self, keys: frozenset[Moment]) -> list[Moments]:
        """Return the moments of the gradients of each parameter, a limited number of entries at a time."""
        entries = sum(map(Tensor.numel, self.parameters))
        step = max(1, CHUNK_ENTRIES // max(1, entries))
        parts: list[list[Moments]] = [[] for _ in self.parameters]
        for start in range(0, max(1, len(self.use)), step):
            gradients = self.rows(start, start + step).gradients(self.parameters)
            for part, gradient in zip(parts, gradients, strict=True):
                part.append(row_moments(flat_rows(gradient), keys))
        return list(map(merge_rows, parts))


@dataclass(frozen=True)
class DerivedUse:
    """A use of a tensor that was computed from parameters alone, pulled back through that computation to one of them.

    If the computation only reorders the parameter's entries, the moments are those of the use. If it selects entries, the gradients
    of these entries are enough.

    Args:
        derivation: The use of the derived tensor, and its graph.
        parameter: A leaf of that graph.
    """

    derivation: Derivation
    parameter: Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return tuple(self.parameter.shape)

    def __len__(self) -> int:
        return len(self.derivation.use)

    def rows(self, start: int, stop: int) -> DerivedUse:  # noqa: D102
        return DerivedUse(self.derivation.rows(start, stop), self.parameter)

    def gradient(self) -> Tensor:  # noqa: D102
        return self.derivation.gradients([self.parameter])[0]

    def moments(self, wanted: Iterable[Moment]) -> Moments:  # noqa: D102
        use, derived = self.derivation.use, self.derivation.derived
        if rearranges(derived, self.parameter):
            return use.moments(wanted)
        selection = selection_of(derived, self.parameter) if isinstance(use, RowsUse) else None
        if selection is not None:
            return row_moments(selection.touched(flat_rows(use.gradient())), wanted)
        return self.derivation.moments(self.parameter, wanted)


def pulled_back(use: Use, derived: Tensor, parameters: Sequence[Tensor]) -> list[Use]:
    """Return the use of a derived tensor as one of each parameter that it depends on.

    Args:
        use: The use.
        derived: The derived tensor, with its graph.
        parameters: The leaves of that graph.
    """
    if len(parameters) == 1:
        rows = _looked_up(use, derived, parameters[0])
        if rows is not None:
            return [rows]
        index = _selected(derived, parameters[0])
        if index is not None:
            return [StackedUse({index: use}, len(parameters[0]))]
    derivation = Derivation(use, derived, tuple(parameters))
    return [DerivedUse(derivation, parameter) for parameter in parameters]


def _selected(derived: Tensor, parameter: Tensor) -> int | None:
    """Return which entry along the first axis of a parameter a tensor is, such as the matrix of an expert; ``None`` for other tensors."""
    node: Any = derived.grad_fn
    if node is None or node.name() != "SelectBackward0" or node._saved_dim:
        return None
    if getattr(node.next_functions[0][0], "variable", None) is not parameter:
        return None
    index: int = node._saved_index
    return (index - 2**64 if index >= 2**63 else index) % len(parameter)  # autograd stores -1 as an unsigned number


def _looked_up(use: Use, derived: Tensor, parameter: Tensor) -> EmbeddingUse | None:
    """Return the use of rows of a table at indices that all samples share, such as position embeddings, as one of the table.

    They are not pulled back: they would become a gradient of the whole table for each sample.
    """
    node: Any = derived.grad_fn
    is_lookup = node is not None and node.name() == "EmbeddingBackward0" and not node._saved_scale_grad_by_freq
    source = getattr(node.next_functions[0][0], "variable", None) if is_lookup else None
    if source is not parameter or not isinstance(use, RowsUse):
        return None
    indices, padding = node._saved_indices, node._saved_padding_idx
    return EmbeddingUse(
        indices.reshape(1, -1).expand(len(use), -1),
        use.gradient().reshape(len(use), indices.numel(), parameter.shape[1]),
        tuple(parameter.shape),
        padding if padding < len(parameter) else None,  # autograd stores a number beyond the table if there is none
    )
