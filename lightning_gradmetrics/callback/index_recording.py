"""Starts and ends the recording of indices in the loops of a trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Trainer

from lightning_gradmetrics.callback.dataloaders import loader_list
from lightning_gradmetrics.callback.drawn_indices import DrawnIndices
from lightning_gradmetrics.callback.module import evaluation_loop, is_side_by_side, processes_of

__all__ = ["IndexRecording", "after_each_call"]


class IndexRecording:
    """Records the indices that the dataloaders of a trainer's evaluation loop draw, starting before their first batch."""

    def __init__(self) -> None:
        self._drawn: DrawnIndices | None = None
        self._undo: Callable[[], None] | None = None

    def watch(self, trainer: Trainer) -> None:
        """Record in each run of the trainer's evaluation loop until :meth:`stop`."""
        self.stop()
        renew = functools.partial(self._renew, trainer)
        self._undo = after_each_call(evaluation_loop(trainer), "setup_data", renew)

    def _renew(self, trainer: Trainer) -> None:
        """Record the dataloaders that a loop has set up and will read next."""
        self.pause()
        combined = getattr(evaluation_loop(trainer), "_combined_loader", None)
        if combined is None:
            return
        processes = processes_of(trainer)
        loaders = loader_list(combined.iterables, not is_side_by_side(trainer))
        self._drawn = DrawnIndices(loaders, processes.rank, processes.count)
        self._drawn.install()

    def of_loaders(self, loaders: Sequence[Any]) -> DrawnIndices:
        """Return the recorded indices of the dataloaders of a run."""
        drawn = self._drawn
        if drawn is None or list(map(id, drawn.loaders)) != list(map(id, loaders)):
            return DrawnIndices(loaders)
        return drawn

    def pause(self) -> None:
        """Restore the dataloaders, until the loop runs again."""
        if self._drawn is not None:
            self._drawn.remove()
            self._drawn = None

    def stop(self) -> None:
        """Restore the dataloaders and the loop."""
        self.pause()
        if self._undo is not None:
            self._undo()
            self._undo = None


def after_each_call(owner: Any, name: str, listener: Callable[[], None]) -> Callable[[], None]:
    """Call a listener after each call of an object's method.

    Args:
        owner: The object.
        name: The name of its method.
        listener: The listener; several may listen to one method.

    Returns:
        A function that undoes this.

    Example:
        >>> class Loop:
        ...     def run(self):
        ...         print("run")
        >>> loop = Loop()
        >>> undo = after_each_call(loop, "run", lambda: print("listened"))
        >>> loop.run()
        run
        listened
        >>> undo()
        >>> vars(loop)
        {}
    """
    listeners = getattr(vars(owner).get(name), "gradmetrics_listeners", None)
    if listeners is None:
        listeners = _wrapped(owner, name)
    listeners.append(listener)
    own = listeners

    def undo() -> None:
        own.remove(listener)
        if not own and getattr(vars(owner).get(name), "gradmetrics_listeners", None) is own:
            del vars(owner)[name]

    return undo


def _wrapped(owner: Any, name: str) -> list[Callable[[], None]]:
    """Replace a method of an object; returns the list of its listeners."""
    listeners: list[Callable[[], None]] = []
    method = getattr(owner, name)

    @functools.wraps(method)
    def heard(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        for listener in list(listeners):
            listener()
        return result

    heard.gradmetrics_listeners = listeners  # type: ignore[attr-defined]
    vars(owner)[name] = heard
    return listeners
