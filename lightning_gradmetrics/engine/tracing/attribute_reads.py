"""Records which attributes of modules a forward pass reads.

A plan depends on the plain attributes that the model's forward pass reads, such as a flag that it branches on. A
counter that only the user's step reads must not count, or every batch would be planned again.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import nn

from lightning_gradmetrics.classifier.forward import has_compiled_parts

__all__ = ["are_reads_visible", "reading_attributes"]

_SILENT = (f"{Path(__file__).parents[2]}{os.sep}", str(Path(nn.modules.module.__file__)))
"""Files whose reads of a module's ``__dict__`` do not count: this package and ``nn.Module``."""

_ACTIVE: list[tuple[set[str], ...]] = [()]
"""The sets of names that are being collected, as one tuple, which other threads may replace meanwhile."""

_WATCHED: Counter[type[nn.Module]] = Counter()
"""For each class how many blocks watch the reads of its modules."""

_LOCK = Lock()


def _recorded(module: nn.Module, name: str) -> Any:
    """Read an attribute of a module and record its name."""
    if name != "__dict__" or not sys._getframe(1).f_code.co_filename.startswith(_SILENT):
        for names in _ACTIVE[0]:
            names.add(name)
    return _READ(module, name)


_READ = object.__getattribute__


@contextmanager
def reading_attributes(model: nn.Module) -> Iterator[set[str]]:
    """Collect the names of the attributes that are read from a model's modules inside the block, including missing ones.

    The name ``__dict__`` means that any attribute may have been read. Only the classes of the modules are changed: a change of
    ``nn.Module`` invalidates the caches of all classes of layers, of which large libraries have thousands.

    Args:
        model: The model.
    """
    names, kinds = set[str](), set(map(type, model.modules()))
    with _LOCK:
        is_free = not any(map(_intercepts, kinds - _WATCHED.keys()))
        if is_free:
            _ACTIVE[0] = (*_ACTIVE[0], names)
            for kind in kinds - _WATCHED.keys():
                kind.__getattribute__ = _recorded  # type: ignore[method-assign, assignment]
            _WATCHED.update(kinds)
    if not is_free:  # another tool intercepts reads
        yield {"__dict__"}
        return
    try:
        yield names
    finally:
        with _LOCK:
            _ACTIVE[0] = tuple(active for active in _ACTIVE[0] if active is not names)
            _WATCHED.subtract(kinds)
            for kind in kinds:
                if not _WATCHED[kind]:
                    del _WATCHED[kind], kind.__getattribute__


def _intercepts(kind: type) -> bool:
    """Return whether a class, or one of its bases, intercepts reads of attributes, except for this module."""
    present: Any = kind.__getattribute__
    return present is not object.__getattribute__ and present is not _recorded


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
