"""Keeps Python's garbage collector from running while a model is planned."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_collections"]


@contextmanager
def without_collections() -> Iterator[None]:
    """Pause Python's collector of cyclic garbage inside the block.

    A plan consists of tens of thousands of objects, enough to start full collections. Each visits every object of the process, which
    takes 0.1 to 0.3 s after large libraries were imported: more than a training step of a small model.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
