"""SIGTERM while several processes score."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_gradmetrics.callback.signals import note_sigterm, stop_after_sigterm


def test_the_users_handler_is_called_and_restored() -> None:
    heard: list[int] = []

    def mine(number: int, frame: Any) -> None:
        heard.append(number)

    before = signal.signal(signal.SIGTERM, mine)
    try:
        connector = SimpleNamespace(received_sigterm=False)
        undo = note_sigterm(SimpleNamespace(_signal_connector=connector))  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)
        undo()
        assert heard == [signal.SIGTERM] and connector.received_sigterm
        assert signal.getsignal(signal.SIGTERM) is mine
        with pytest.raises(SIGTERMException):
            stop_after_sigterm(connector)  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGTERM, before)
