"""Collective operations of the processes of a run; a single process returns its own values."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from lightning_gradmetrics.callback.alarm import Alarm

__all__ = ["Processes"]

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Args:
        count: The number of processes.
        rank: The number of this process.
        alarm: Stops every process when one of them fails, even while the others wait for it; or ``None``.

    Example:
        >>> alone = Processes()
        >>> alone.all_gather("mine"), alone.gather("mine"), alone.from_first(lambda: "mine")
        (['mine'], ['mine'], 'mine')
    """

    count: int = 1
    rank: int = 0
    alarm: Alarm | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def warn(self, text: str) -> None:
        """Warn once for all processes."""
        if self.is_first:
            warnings.warn(text, stacklevel=3)

    def check(self) -> None:
        """Raise if another process failed.

        Raises:
            RuntimeError: If another process failed; the message contains its error.
        """
        if self.alarm is not None:
            self.alarm.check()

    def raise_alarm(self, error: BaseException) -> None:
        """Tell the other processes that this one failed."""
        if self.alarm is not None:
            self.alarm.raise_alarm(error)

    def wait_for_others(self) -> None:
        """After a failure, wait a few seconds for the other processes to stop."""
        if self.alarm is not None:
            self.alarm.wait_for_others()

    def _meet(self) -> None:
        """Wait for the other processes before a collective operation, which could not be interrupted."""
        if self.alarm is not None:
            self.alarm.meet()

    def all_gather(self, value: T) -> list[T]:
        """Return every process's value in the order of the ranks, on every process."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        self._meet()
        torch.distributed.all_gather_object(values, value)
        return values

    def gather(self, value: T) -> list[T]:
        """Return every process's value in the order of the ranks on rank 0; an empty list on the others."""
        if self.count == 1:
            return [value]
        values: list[Any] | None = [None] * self.count if self.is_first else None
        self._meet()
        torch.distributed.gather_object(value, values)
        return values or []

    def together(self, action: Callable[[], T]) -> T:
        """Return what an action returns on this process; if it fails on any process, every process raises.

        Raises:
            RuntimeError: If the action raises on another process; the message contains its error.
        """
        if self.count == 1:
            return action()
        try:
            value = action()
        except Exception as error:
            self.all_gather(f"{type(error).__name__}: {error}")
            raise
        for rank, problem in enumerate(self.all_gather("")):
            if problem:
                raise RuntimeError(f"rank {rank} failed, so rank {self.rank} stops too. Its error: {problem}")
        return value

    def from_first(self, compute: Callable[[], T]) -> T:
        """Compute a value on rank 0 and return it on every process; an error is raised on every process.

        Raises:
            RuntimeError: On the other processes, if ``compute`` raises on rank 0; the message contains its error.
        """
        if self.count == 1:
            return compute()
        if not self.is_first:
            return self._received()  # type: ignore[no-any-return]
        try:
            value = compute()
        except Exception as error:
            self._meet()
            torch.distributed.broadcast_object_list([None, f"{type(error).__name__}: {error}"])
            raise
        self._meet()
        torch.distributed.broadcast_object_list([value, None])
        return value

    def _received(self) -> Any:
        box: list[Any] = [None, None]
        self._meet()
        torch.distributed.broadcast_object_list(box)
        value, error = box
        if error is not None:
            raise RuntimeError(f"rank 0 failed, so rank {self.rank} stops too. Its error: {error}")
        return value
