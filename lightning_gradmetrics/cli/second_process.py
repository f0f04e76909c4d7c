"""A second process for work beside the run. It starts as a copy of this process, which has imported all that it needs."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

__all__ = ["SecondProcess", "second_process", "usable_cores"]

Value = TypeVar("Value")

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
"""Variables with the number of this process in a distributed run."""


@dataclass(frozen=True)
class _Worker:
    """A process that runs :func:`_serve`, and this process's end of the connection to it."""

    process: BaseProcess
    connection: Connection


@dataclass(frozen=True)
class _Answer:
    """The result of a function, or the traceback of its error."""

    value: Any = None
    error: str = ""


class SecondProcess:
    """Runs functions beside this process, one after the other; without a process, :meth:`submit` runs them immediately.

    Args:
        worker: The process, or ``None``.
    """

    def __init__(self, worker: _Worker | None) -> None:
        self._worker = worker
        self._thread = ThreadPoolExecutor(1)

    def submit(self, work: Callable[[], Value]) -> Callable[[], Value]:
        """Start a function in the second process after those before it.

        If the second process has ended, or the function cannot be pickled, this process runs it.

        Args:
            work: The function. Its result can be pickled.

        Returns:
            A function that waits for the result and returns it. It raises a RuntimeError if the function or the process fails.
        """
        worker = self._worker
        content = _pickled(work) if worker is not None and worker.process.is_alive() else None
        if worker is None or content is None:
            value = work()
            return lambda: value
        answer = self._thread.submit(_exchange, worker, content)
        return lambda: _result(answer.result())

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._worker is not None:
            self._worker.process.kill()
            self._thread.shutdown()  # its thread may be waiting for the process too
            self._worker.process.join()
            self._worker.connection.close()
            self._worker.process.close()


def _exchange(worker: _Worker, content: bytes) -> _Answer:
    """Send a pickled function to a process, and return its answer."""
    try:
        worker.connection.send_bytes(content)
        answer: _Answer = worker.connection.recv()
    except (OSError, EOFError):  # it is ending
        worker.process.join()
        return _Answer(error=f"the second process ended with status {worker.process.exitcode}")
    return answer


def _result(answer: _Answer) -> Any:
    """Return the value of an answer.

    Raises:
        RuntimeError: If the function failed.
    """
    if answer.error:
        raise RuntimeError(f"the figures could not be saved: {answer.error.splitlines()[-1]}") from RuntimeError(
            answer.error
        )
    return answer.value


@contextmanager
def second_process(wanted: bool = True) -> Iterator[SecondProcess]:
    """Start a second process, and end it at the end of the block.

    There is none if this process may use one core only, or if it is not the first one of a distributed run.

    Args:
        wanted: Whether to start a process.
    """
    process = SecondProcess(_started() if wanted and _has_free_core() else None)
    try:
        yield process
    finally:
        process.close()


def _serve(connection: Connection, other_end: Connection | None) -> None:
    """Run the functions that a connection receives, and send their results.

    Args:
        connection: The connection.
        other_end: A copy of the other end, to be closed: the connection ends when no process has the other end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    if other_end is not None:
        other_end.close()
    sys.stdout = sys.stderr  # the functions may print, and the standard output is for the tables
    os.dup2(2, 1)
    _prepare()
    with suppress(EOFError, OSError):  # the first process has ended
        while True:
            connection.send(_answer(connection.recv()))


def _prepare() -> None:
    """Import what drawing requires. One thread suffices; besides, the threads of torch do not survive a fork."""
    gc.disable()  # figures are few, and the collector takes a fourth of the time
    import torch
    from matplotlib.backends import backend_agg, backend_pdf, backend_svg  # noqa: F401

    import lightning_gradmetrics.cli.figures  # noqa: F401

    torch.set_num_threads(1)


def _answer(work: Callable[[], Any]) -> _Answer:
    try:
        return _Answer(work())
    except Exception:
        return _Answer(error=traceback.format_exc())
    finally:
        sys.stdout.flush()


def _has_free_core() -> bool:
    """Return whether this process may use several cores, and is not one of several processes that draw nothing."""
    if os.environ.get("OMP_NUM_THREADS") == "1" or any(os.environ.get(name, "0") != "0" for name in RANKS):
        return False
    return usable_cores() > 1


def usable_cores() -> int:
    """Return the number of processor cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return cores or 1


def _started() -> _Worker | None:
    """Start a process; ``None`` in a process that may have no children."""
    if multiprocessing.current_process().daemon:
        return None
    context = multiprocessing.get_context("fork" if _can_fork() else "spawn")
    here, there = context.Pipe()
    other_end = here if context.get_start_method() == "fork" else None
    process = context.Process(target=_serve, args=(there, other_end))  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # on the idle threads of numerical libraries
        process.start()
    there.close()
    return _Worker(process, here)


def _can_fork() -> bool:
    """Return whether a copy of this process works: no other thread runs Python, and no GPU is in use."""
    if sys.platform != "linux" or threading.active_count() > 1:
        return False
    torch = sys.modules.get("torch")
    return torch is None or not torch.cuda.is_initialized()


def _pickled(work: Callable[[], Any]) -> bytes | None:
    try:
        return pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
