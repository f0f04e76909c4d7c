"""A second process for work beside the run. It imports what drawing requires while this process imports Lightning."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

__all__ = ["SecondProcess", "second_process", "serve"]

Value = TypeVar("Value")

PROGRAM = "from lightning_gradmetrics.cli.second_process import serve; serve()"
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
"""Variables with the number of this process in a distributed run."""


class SecondProcess:
    """Runs one function beside this process; without a process, :meth:`submit` runs it immediately.

    Args:
        process: A process that runs :func:`serve`, or ``None``.
    """

    def __init__(self, process: subprocess.Popen[bytes] | None) -> None:
        self._process = process
        self._thread = ThreadPoolExecutor(1)

    def submit(self, work: Callable[[], Value]) -> Callable[[], Value]:
        """Start a function in the second process, at most once.

        If the second process has ended, or the function cannot be pickled, this process runs it.

        Args:
            work: The function. Its result can be pickled.

        Returns:
            A function that waits for the result and returns it, and prints the warnings of the second process. It raises
            a RuntimeError if the second process fails.
        """
        process = self._process
        content = _pickled(work) if process is not None and process.poll() is None else None
        if process is None or content is None:
            value = work()
            return lambda: value
        answer = self._thread.submit(process.communicate, content)
        return lambda: _result(process, *answer.result())

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._thread.submit(self._process.communicate)
        self._thread.shutdown()


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


def serve() -> None:
    """Run the pickled function of the standard input, and write its pickled result to the standard output."""
    from matplotlib.backends import backend_agg, backend_pdf, backend_svg  # noqa: F401

    import lightning_gradmetrics.cli.figures  # noqa: F401  # with these, nearly all that the function needs

    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answer:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the function may print
        content = sys.stdin.buffer.read()
        if content:
            pickle.dump(pickle.loads(content)(), answer)


def _has_free_core() -> bool:
    """Return whether this process may use several cores, and is not one of several processes that draw nothing."""
    if os.environ.get("OMP_NUM_THREADS") == "1" or any(os.environ.get(name, "0") != "0" for name in RANKS):
        return False
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return (cores or 1) > 1


def _started() -> subprocess.Popen[bytes]:
    options = [f"-W{option}" for option in sys.warnoptions]
    paths = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *options, "-c", PROGRAM]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)


def _pickled(work: Callable[[], Any]) -> bytes | None:
    try:
        return pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None


def _result(process: subprocess.Popen[bytes], answer: bytes, errors: bytes) -> Any:
    """Return the result of a process that has ended, and print its warnings.

    Raises:
        RuntimeError: If it failed.
    """
    messages = errors.decode(errors="replace")
    if process.returncode:
        lines = messages.strip().splitlines() or [f"it ended with status {process.returncode}"]
        cause = subprocess.CalledProcessError(process.returncode, "the second process", stderr=messages)
        raise RuntimeError(f"the figures could not be saved: {lines[-1]}") from cause
    sys.stderr.write(messages)
    return pickle.loads(answer)
