"""Runs compiled modules uncompiled, or as ``torch.compile`` does, in several threads at once.

The stance of ``torch.compile`` is one for all threads. If two threads each restored the one that they have found, they could
leave the wrong one behind.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

__all__ = ["compiling", "eager"]

_LOCK = threading.RLock()
_own = threading.local()
_blocks = 0
_outer: Any = None


def eager() -> AbstractContextManager[None]:
    """Run compiled modules uncompiled inside the block, so that their calls can be intercepted."""
    return _eager() if "torch._dynamo" in sys.modules else nullcontext()  # otherwise nothing has been compiled


@contextmanager
def _eager() -> Iterator[None]:
    global _blocks, _outer
    with _LOCK:
        if not _blocks:
            _outer = torch.compiler.set_stance("force_eager")  # type: ignore[no-untyped-call]
        _blocks += 1
        _own.blocks = _own_blocks() + 1
    try:
        yield
    finally:
        with _LOCK:
            _blocks -= 1
            _own.blocks -= 1
            if not _blocks:
                _outer.__exit__(None, None, None)


@contextmanager
def compiling() -> Iterator[bool]:
    """Let ``torch.compile`` trace and run functions inside the block, in this thread only.

    Yields:
        False if it cannot, because another thread is in a block of :func:`eager`.
    """
    with _LOCK:
        if _blocks > _own_blocks():
            yield False
        else:
            with torch.compiler.set_stance("default"):  # type: ignore[no-untyped-call]
                yield True


def _own_blocks() -> int:
    return getattr(_own, "blocks", 0)
