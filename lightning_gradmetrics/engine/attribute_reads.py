"""Records which attributes of modules a forward pass reads.

A plan depends on the plain attributes that the model's forward pass reads, such as a flag that it branches on. A
counter that only the user's step reads must not count, or every batch would be planned again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import nn

from lightning_gradmetrics.classifier.forward import has_compiled_parts

__all__ = ["are_reads_visible", "reading_attributes"]

_SILENT = (f"{Path(__file__).parents[1]}{os.sep}", str(Path(nn.modules.module.__file__)))
"""Files whose reads of a module's ``__dict__`` do not count: this package and ``nn.Module``."""

_ACTIVE: list[set[str]] = []
_LOCK = Lock()


def _recorded(module: nn.Module, name: str) -> Any:
    """Read an attribute of a module and record its name."""
    if name != "__dict__" or not sys._getframe(1).f_code.co_filename.startswith(_SILENT):
        for names in list(_ACTIVE):
            names.add(name)
    return object.__getattribute__(module, name)


@contextmanager
def reading_attributes() -> Iterator[set[str]]:
    """Collect the names of the attributes that are read from modules inside the block, including missing ones.

    The name ``__dict__`` means that any attribute may have been read.
    """
    names: set[str] = set()
    if "__getattribute__" in vars(nn.Module) and not _ACTIVE:  # another tool intercepts reads
        yield {"__dict__"}
        return
    with _LOCK:
        _ACTIVE.append(names)
        nn.Module.__getattribute__ = _recorded  # type: ignore[method-assign, assignment]
    try:
        yield names
    finally:
        with _LOCK:
            _ACTIVE[:] = [active for active in _ACTIVE if active is not names]
            if not _ACTIVE:
                del nn.Module.__getattribute__


def are_reads_visible(model: nn.Module) -> bool:
    """Return whether every read of a module's attribute goes through Python's attribute access.

    Compiled and scripted modules read attributes in other ways, and a class may override the access.
    """
    if has_compiled_parts(model):
        return False
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            return False
        if any("__getattribute__" in vars(kind) for kind in type(module).__mro__ if kind not in (nn.Module, object)):
            return False
    return True
