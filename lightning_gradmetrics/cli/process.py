"""The process of ``gradmetrics``, which ends without freeing its objects."""

from __future__ import annotations

import atexit
import logging
import os
import sys

from lightning_gradmetrics.cli.command import main

__all__ = ["run_process"]


def run_process() -> None:
    """Run :func:`~lightning_gradmetrics.cli.command.main`, and end the process.

    With torch and Lightning imported, an interpreter takes as long to free its objects as to import them. Threads are joined and
    functions of :mod:`atexit` are called as usual.
    """
    status: list[int] = []

    def end() -> None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status[0])

    atexit.register(end)  # as the first one, it is called after all that are registered later
    try:
        main()
        status.append(0)
    except SystemExit as ending:
        status.append(ending.code if isinstance(ending.code, int) else int(ending.code is not None))
        raise
    except BaseException:
        status.append(1)
        raise
