"""A second process for work beside the run. It imports what drawing requires while this process imports Lightning."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from subprocess import PIPE
from typing import Any, TypeVar

__all__ = ["SecondProcess", "second_process", "serve"]

Value = TypeVar("Value")

PROGRAM = "from lightning_gradmetrics.cli.second_process import serve; serve()"
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
"""Variables with the number of this process in a distributed run."""


class SecondProcess:
    """Runs functions beside this process, one after the other; without a process, :meth:`submit` runs them immediately.

    Args:
        process: A process that runs :func:`serve`, or ``None``.
    """

    def __init__(self, process: subprocess.Popen[bytes] | None) -> None:
        self._process = process
        self._thread, self._reader = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._messages = None if process is None else self._reader.submit(_read, process)

    def submit(self, work: Callable[[], Value]) -> Callable[[], Value]:
        """Start a function in the second process after those before it.

        If the second process has ended, or the function cannot be pickled, this process runs it.

        Args:
            work: The function. Its result can be pickled.

        Returns:
            A function that waits for the result and returns it. It raises a RuntimeError if the second process fails.
        """
        process = self._process
        content = _pickled(work) if process is not None and process.poll() is None else None
        if process is None or content is None:
            value = work()
            return lambda: value
        answer = self._thread.submit(_exchange, process, content)
        return lambda: self._result(process, answer.result())

    def _result(self, process: subprocess.Popen[bytes], answer: list[Any]) -> Any:
        """Return the only element of an answer.

        Raises:
            RuntimeError: If the answer is empty, because the process failed.
        """
        if answer:
            return answer[0]
        messages = self._messages.result() if self._messages is not None else ""
        lines = messages.strip().splitlines() or [f"it ended with status {process.returncode}"]
        cause = subprocess.CalledProcessError(process.returncode, "the second process", stderr=messages)
        raise RuntimeError(f"the figures could not be saved: {lines[-1]}") from cause

    def close(self) -> str:
        """End the process, whatever it does, and return its messages."""
        if self._process is None or self._messages is None:
            return ""
        self._process.kill()
        self._process.wait()
        self._thread.shutdown()
        messages = self._messages.result()
        self._reader.shutdown()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            with suppress(OSError):  # a pipe that nobody reads
                if pipe is not None:
                    pipe.close()
        return messages


def _read(process: subprocess.Popen[bytes]) -> str:
    """Return all messages of a process when it has ended."""
    assert process.stderr is not None
    return process.stderr.read().decode(errors="replace")


def _exchange(process: subprocess.Popen[bytes], content: bytes) -> list[Any]:
    """Send a pickled function to a process, and return a list with its result; empty if the process has failed."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(content)
        process.stdin.flush()
        return [pickle.load(process.stdout)]
    except (OSError, EOFError):  # it is ending
        process.wait()
        return []


@contextmanager
def second_process(wanted: bool = True) -> Iterator[SecondProcess]:
    """Start a second process, and end it at the end of the block.

    There is none if this process may use one core only, or if it is not the first one of a distributed run. Its warnings are
    printed at the end, unless an error ends the block.

    Args:
        wanted: Whether to start a process.
    """
    process = SecondProcess(_started() if wanted and _has_free_core() else None)
    messages = ""
    try:
        yield process
    finally:
        messages = process.close()
    sys.stderr.write(messages)


def serve() -> None:
    """Run the pickled functions of the standard input, and write their pickled results to the standard output."""
    gc.disable()  # figures are few, and the collector takes a fourth of the time
    from matplotlib.backends import backend_agg, backend_pdf, backend_svg  # noqa: F401

    import lightning_gradmetrics.cli.figures  # noqa: F401  # with these, nearly all that the function needs

    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the functions may print
        while True:
            try:
                work = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            answer = work()
            sys.stdout.flush()
            pickle.dump(answer, answers)
            answers.flush()


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
    return subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment)


def _pickled(work: Callable[[], Any]) -> bytes | None:
    try:
        return pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
