"""Rows in the order of a sort: the samples that own them, and the uses of parameters in calls on them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.passes.plan import PlanError, Source
from lightning_gradmetrics.engine.rules import Call, Rule
from lightning_gradmetrics.engine.tracing.axes import Axis
from lightning_gradmetrics.engine.tracing.sorts import SortedKeys, keys_of_sort
from lightning_gradmetrics.engine.uses import EmbeddingUse, Use

__all__ = ["GroupedProduct", "LookUp", "SortWatch", "SortedCall"]


class SortWatch:
    """Compares the sorts of a forward pass, and the groups of sorted rows, with a plan.

    Args:
        planned: For each product of groups the number of the sort whose order its rows have.
        size: The number of samples.

    Attributes:
        sorts: The sorts so far.
        groups: The number of products of groups so far.
    """

    def __init__(self, planned: Sequence[int], size: int) -> None:
        self.planned, self.size, self.groups = planned, size, 0
        self.sorts: list[SortedKeys] = []

    def add(self, function: Any, args: Any, result: Any) -> None:
        """Note a call if it is a sort."""
        keys = keys_of_sort(function, args, result)
        if keys is not None:
            self.sorts.append(keys)

    def owners_in_groups(self, values: Mapping[str, Any]) -> Tensor:
        """Return the sample of each row of the next product of groups, ``(R,)``.

        Args:
            values: The arguments of the product by name.

        Raises:
            PlanError: If the groups are not those of the planned sort.
        """
        number, self.groups = self.groups, self.groups + 1
        if number >= len(self.planned):
            raise PlanError("the model multiplies more groups of rows than planned")
        owners = self.owners_in_order(self.planned[number], len(values["input"]))
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if not self.sorts[self.planned[number]].ends_at(values["offs"]):
                raise PlanError("the groups of rows are not those of the planned sort")
        return owners

    def owners_in_order(self, sort: int, count: int) -> Tensor:
        """Return the sample of each of some rows in the order of a sort, ``(R,)``.

        Args:
            sort: The number of the sort.
            count: The number of rows.

        Raises:
            PlanError: If it has not sorted as many.
        """
        if sort >= len(self.sorts) or len(self.sorts[sort].indices) != count or count % self.size:
            raise PlanError("the model sorts other rows than planned")
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return self.sorts[sort].owners(self.size)

    def require_all(self) -> None:
        """Require that all planned groups were compared.

        Raises:
            PlanError: If they were not.
        """
        if self.groups != len(self.planned):
            raise PlanError("the model multiplies fewer groups of rows than planned")


@dataclass(frozen=True)
class GroupedProduct:
    """A product of each group of sorted rows with its own matrix.

    Args:
        rule: The rule of the product.
        call: Its arguments, among them the samples of the rows as ``owners``.
        slots: The parameters and derived tensors by the names of the arguments.
        version: The version of the input.
    """

    rule: Rule
    call: Call
    slots: Mapping[str, Source]
    version: int

    @property
    def sources(self) -> Collection[Source]:
        """The parameters and derived tensors."""
        return self.slots.values()

    @property
    def axis(self) -> Axis:
        """The sample axis of the rows, once they are in the order of the samples."""
        return self.call.out

    def is_changed(self) -> bool:
        """Return whether the input was changed in place since."""
        return bool(self.call.values["input"]._version != self.version)

    def factors(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of the gradient's terms: the input, and the gradient of the output in the order of the samples."""
        return self.call.values["input"], g[self.call.values["owners"].argsort(stable=True)]

    def uses(self, g: Tensor) -> Iterator[tuple[Source, Use]]:
        """Yield the use of each source, from the gradient of the output."""
        for slot, use in self.rule.uses(self.call, g):
            yield self.slots[slot], use

    def clear(self) -> None:
        """Release the arguments."""
        self.call.values.clear()


@dataclass(frozen=True)
class LookUp:
    """A look-up of rows of a table by an integer of each sorted row.

    Args:
        source: The table.
        shape: Its shape.
        index: The integers ``(R,)``, none of which is negative.
        owners: The samples of the rows.
        axis: The sample axis of the rows, once they are in the order of the samples.
    """

    source: Source
    shape: tuple[int, ...]
    index: Tensor
    owners: Tensor
    axis: Axis

    @property
    def sources(self) -> Collection[Source]:
        """The table."""
        return [self.source]

    def is_changed(self) -> bool:
        """Return False: the integers are a copy."""
        return False

    def factors(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return twice the gradient of the output in the order of the samples, which the gradient's terms consist of."""
        rows = g[self.owners.argsort(stable=True)]
        return rows, rows

    def uses(self, g: Tensor) -> Iterator[tuple[Source, Use]]:
        """Yield the use of the table, from the gradient of the output."""
        by_sample = self.owners.argsort(stable=True)
        indices = self.index[by_sample].view(-1, self.axis.times)
        yield self.source, EmbeddingUse(indices, g[by_sample].view(*indices.shape, self.shape[1]), self.shape)

    def clear(self) -> None:
        """Do nothing: integers take little memory."""


SortedCall = GroupedProduct | LookUp
"""A call of a parameter and sorted rows."""
