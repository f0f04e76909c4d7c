"""Handles SIGTERM while several processes score."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

__all__ = ["note_sigterm", "stop_after_sigterm"]


def note_sigterm(trainer: Trainer) -> Callable[[], None]:
    """Make SIGTERM only set ``trainer.received_sigterm``; return a function that undoes this.

    Lightning's handler also starts a broadcast, which never ends if only one process received the signal. The user's
    handlers are still called.

    Args:
        trainer: The trainer.
    """
    if threading.current_thread() is not threading.main_thread():
        return _nothing
    connector: Any = trainer._signal_connector
    previous = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        connector.received_sigterm = True
        for handler in getattr(previous, "signal_handlers", (previous,)):
            if callable(handler) and getattr(handler, "__self__", None) is not connector:
                handler(number, frame)

    def undo() -> None:
        if signal.getsignal(signal.SIGTERM) is handle:
            signal.signal(signal.SIGTERM, previous)

    signal.signal(signal.SIGTERM, handle)
    return undo


def _nothing() -> None:
    """Do nothing."""


def stop_after_sigterm(trainer: Trainer) -> None:
    """Raise if the process received SIGTERM, because Lightning's prediction loop would run to its end.

    Raises:
        SIGTERMException: If the process received SIGTERM.
    """
    if trainer.received_sigterm:
        raise SIGTERMException(128 + signal.SIGTERM)
