"""Which rows of a batch are the samples that a step passed to the model, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["SampleRows"]


@dataclass(frozen=True)
class SampleRows:
    """The rows of the step's batch that the samples of the model's call are.

    Args:
        size: The number of rows of the batch.
        order: The position in the batch of each sample ``(N,)``, or ``None`` if the samples are all rows in their order.

    Example:
        >>> import torch
        >>> rows = SampleRows(4, torch.tensor([3, 1]))
        >>> rows.of_list(["a", "b", "c", "d"]), rows.left_out
        (['d', 'b'], 2)
    """

    size: int
    order: Tensor | None = None

    @property
    def left_out(self) -> int:
        """The number of rows that the step did not pass to the model."""
        return 0 if self.order is None else self.size - len(self.order)

    def of(self, values: Tensor) -> Tensor:
        """Return the values of the samples ``(N, ...)``.

        Args:
            values: One value for each row of the batch ``(size, ...)``.
        """
        return values if self.order is None else values[self.order.to(values.device)]

    def of_list(self, values: Sequence[str]) -> list[str]:
        """Return the entries of the samples; ``values`` has one entry for each row of the batch."""
        if self.order is None:
            return list(values)
        return [values[number] for number in self.order.tolist()]
