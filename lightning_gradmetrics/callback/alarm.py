"""Stops every process of a run when one of them fails."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

__all__ = ["Alarm", "alarm_of"]

T = TypeVar("T")

SECONDS_BETWEEN_CHECKS = 0.5
SECONDS_FOR_OTHERS = 5.0
"""How long a failed process waits for the others to stop, so that they can still read its error."""

SECONDS_FOR_A_MEETING = 1800.0
"""How long a process waits for the others: the default timeout of torch's process groups."""

FAILURE = "failure"
STOPPED = "stopped"


def _nothing() -> None:
    """Do nothing."""


@dataclass
class Alarm:
    """Shares the first failure of a run through the key-value store of the process group.

    A collective operation waits for a failed process until the process group times out, by default after 30 minutes.
    Reading a key from the store never waits for another process.

    Args:
        store: The store of the process group, with a prefix of this run.
        count: The number of processes.
        rank: The number of this process.
        check_signal: Raises if this process received a signal that ends the run.

    Example:
        >>> store = torch.distributed.HashStore()
        >>> first, second = Alarm(store, 2, 0), Alarm(store, 2, 1)
        >>> first.check()
        >>> second.raise_alarm(ValueError("no such file"))
        >>> first.check(now=True)
        Traceback (most recent call last):
        ...
        RuntimeError: rank 1 failed, so rank 0 stops too. Its error: ValueError: no such file
    """

    store: Any
    count: int
    rank: int
    check_signal: Callable[[], None] = _nothing
    _meetings: int = 0
    _has_stopped: bool = False
    _checked: float = field(default_factory=time.monotonic)

    def raise_alarm(self, error: BaseException) -> None:
        """Tell the other processes that this one failed.

        Args:
            error: The error of this process.
        """
        if self._has_stopped:
            return
        with contextlib.suppress(RuntimeError):  # rank 0 hosts the store, and may have ended
            if not self.store.check([FAILURE]):
                self.store.set(FAILURE, f"{self.rank} {type(error).__name__}: {error}".rstrip(": "))
            self._stop()

    def check(self, *, now: bool = False) -> None:
        """Raise if another process failed.

        Args:
            now: Whether to read the store even if it was read less than half a second ago.

        Raises:
            RuntimeError: If another process failed, or rank 0 ended; the message contains its error.
        """
        if not now and time.monotonic() - self._checked < SECONDS_BETWEEN_CHECKS:
            return
        self._checked = time.monotonic()
        if not self._ask(lambda: self.store.check([FAILURE])):
            return
        failure = self._ask(lambda: self.store.get(FAILURE)).decode()
        rank, _, problem = failure.partition(" ")
        self._ask(self._stop)
        raise RuntimeError(f"rank {rank} failed, so rank {self.rank} stops too. Its error: {problem}")

    def meet(self) -> None:
        """Wait until every process calls this.

        Raises:
            RuntimeError: If another process fails in the meantime.
        """
        self._meetings += 1
        key, pause = f"meeting {self._meetings}", 0.001
        arrived = self._ask(lambda: self.store.add(key, 1))
        end = time.monotonic() + SECONDS_FOR_A_MEETING
        while arrived < self.count:
            if time.monotonic() > end:
                raise RuntimeError(
                    f"rank {self.rank} waited {SECONDS_FOR_A_MEETING:.0f} s for the other processes: one of them was killed or hangs"
                )
            self.check_signal()
            self.check()
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
            arrived = self._ask(lambda: self.store.add(key, 0))

    def wait_for_others(self) -> None:
        """Wait until the other processes have stopped, for ``SECONDS_FOR_OTHERS`` at most."""
        end = time.monotonic() + SECONDS_FOR_OTHERS
        with contextlib.suppress(RuntimeError):  # rank 0 ended already
            while self.store.add(STOPPED, 0) < self.count and time.monotonic() < end:
                time.sleep(0.05)

    def _stop(self) -> None:
        """Record in the store that this process stops."""
        if not self._has_stopped:
            self._has_stopped = True
            self.store.add(STOPPED, 1)

    def _ask(self, question: Callable[[], T]) -> T:
        """Return the result of a query of the store; raise if rank 0, which hosts it, has ended."""
        try:
            return question()
        except RuntimeError as error:
            raise RuntimeError(f"rank 0 ended, so rank {self.rank} stops too") from error


def alarm_of(run: int, count: int, rank: int, check_signal: Callable[[], None]) -> Alarm | None:
    """Return the alarm of a run; ``None`` for a single process, or if the processes share no store.

    Args:
        run: The number of the run, the same on every process.
        count: The number of processes.
        rank: The number of this process.
        check_signal: Raises if this process received a signal that ends the run.
    """
    distributed = torch.distributed
    if count == 1 or not distributed.is_available() or not distributed.is_initialized():
        return None
    store = distributed.distributed_c10d._get_default_store()
    of_run = distributed.PrefixStore(f"gradmetrics {run}", store)  # type: ignore[attr-defined]
    return Alarm(of_run, count, rank, check_signal)
