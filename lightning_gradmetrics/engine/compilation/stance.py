"""Runs compiled modules uncompiled, or as ``torch.compile`` does, in several threads at once.

The stance of ``torch.compile`` is one for all threads. If two threads each restored the one that they have found, they could
leave the wrong one behind.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import nn

__all__ = ["compiling", "eager"]

_LOCK = threading.RLock()
_own = threading.local()
_blocks = 0
_restore: Callable[[], Any]


def eager() -> AbstractContextManager[None]:
    """Run compiled modules uncompiled inside the block, so that their calls can be intercepted."""
    return _Eager() if "torch._dynamo" in sys.modules else nullcontext()  # otherwise nothing has been compiled


class _Eager:
    """A block in which compiled modules run uncompiled; it is entered in each call on a small model."""

    __slots__ = ()

    def __enter__(self) -> None:
        global _blocks, _restore
        with _LOCK:
            if not _blocks:
                _restore = _switched("force_eager")
            _blocks += 1
            _own.blocks = _own_blocks() + 1

    def __exit__(self, *_: object) -> None:
        global _blocks
        with _LOCK:
            _blocks -= 1
            _own.blocks -= 1
            if not _blocks:
                _restore()


@contextmanager
def compiling(model: nn.Module) -> Iterator[bool]:
    """Let ``torch.compile`` trace and run functions inside the block, in this thread only.

    The attributes that it adds to the parameters and buffers of a model are removed at the end.

    Yields:
        False if it cannot, because another thread is in a block of :func:`eager`.
    """
    with _LOCK:
        if _blocks > _own_blocks():
            yield False
            return
        unmarked = [tensor for tensor in (*model.parameters(), *model.buffers()) if _MARK not in vars(tensor)]
        restore = _switched("default")
        try:
            yield True
        finally:
            restore()
            for tensor in unmarked:
                vars(tensor).pop(_MARK, None)


_MARK = "_dynamo_static_input_type"
"""The attribute of tensors that stay at one address in all calls; no guard reads it."""


def _own_blocks() -> int:
    return getattr(_own, "blocks", 0)


def _switched(stance: Literal["default", "force_eager"]) -> Callable[[], Any]:
    """Set the stance of ``torch.compile``, and return a function that restores the earlier one.

    ``torch.compiler.set_stance`` makes a new stance and sets it several times, so the function behind it is called if it is there.

    Raises:
        RuntimeError: If a function runs that ``torch.compile`` compiles.
    """
    if torch.compiler.is_compiling():  # torch.compile is tracing this line
        raise RuntimeError("the stance cannot be set in a torch.compile region")
    known = _private_stance(stance)
    if known is None:
        block = torch.compiler.set_stance(stance)  # type: ignore[no-untyped-call]
        return partial(block.__exit__, None, None, None)
    set_to, value = known
    return partial(set_to, set_to(value))


@lru_cache
def _private_stance(name: Literal["default", "force_eager"]) -> tuple[Callable[[Any], Any], Any] | None:
    """Return torch's function that sets a stance and returns the earlier one, and the stance; ``None`` if they are unknown."""
    try:
        from torch._dynamo.eval_frame import DynamoStance, _set_stance

        stance = DynamoStance(name)  # type: ignore[arg-type]
        before = _set_stance(stance)
        is_set = _set_stance(before) is stance
    except (ImportError, AttributeError, TypeError):
        return None
    return (_set_stance, stance) if is_set and type(before) is DynamoStance else None
