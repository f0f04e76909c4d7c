"""The assumption that every input as long as the batch has one row per sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Assumption"]


@dataclass
class Assumption:
    """The assumption that every tensor as long as the batch has one row per sample, until logits of parts of the batch confirm it.

    Args:
        decide: Returns for each tensor whether it has one row per sample, by running the model.
        note: Records that the assumption is right.

    Attributes:
        is_confirmed: Whether it is right.
    """

    decide: Callable[[], tuple[bool, ...]]
    note: Callable[[], None]
    is_confirmed: bool = False

    def examine(self, assumed: tuple[bool, ...]) -> bool:
        """Return whether it is right, by running the model."""
        self.is_confirmed = self.decide() == assumed
        return self.is_confirmed

    def confirm(self) -> None:
        """Record that it is right."""
        self.is_confirmed = True
        self.note()
