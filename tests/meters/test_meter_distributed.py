"""Every meter under 1, 2 and 3 processes equals the single process, with sizes that none of these numbers divides."""

from __future__ import annotations

import socket

import pytest
from torch import multiprocessing

from tests.meters.distributed_worker import check


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_one_two_and_three_processes_equal_one():
    multiprocessing.spawn(check, (_free_port(),), nprocs=3)
