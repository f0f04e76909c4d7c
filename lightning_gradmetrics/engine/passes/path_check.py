"""Compares the calls of a forward pass with those of an earlier one as they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from lightning_gradmetrics.classifier.tensor_records import version_of
from lightning_gradmetrics.engine.passes.known_calls import KnownCall, KnownPath, TensorList, described, is_equal
from lightning_gradmetrics.engine.passes.path_record import PathRecorder, leaves_of
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.calls import tensors_in
from lightning_gradmetrics.engine.tracing.graph import storing_hooks
from lightning_gradmetrics.engine.tracing.masks import marks_so_many, selecting_mask
from lightning_gradmetrics.engine.tracing.model_state import ForwardState, quiet_no_grad
from lightning_gradmetrics.engine.tracing.outline import Outline, Recording

__all__ = ["PathChanged", "PathCheck", "PathFollower", "forward_alone", "logits_on_path"]

_HARMLESS = frozenset(
    [
        "__len__",
        "dim",
        "ndimension",
        "size",
        "stride",
        "numel",
        "nelement",
        "element_size",
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "_assert",
    ]
)
"""Functions that return no tensors, read no values and change nothing."""

_HARMLESS_ATTRIBUTES = frozenset(
    getattr(Tensor, name).__get__
    for name in [
        *("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_leaf", "itemsize", "nbytes"),
        *("is_cuda", "is_meta", "is_nested", "is_sparse", "is_quantized"),
    ]
)


_VERSION = Tensor._version.__get__  # type: ignore[attr-defined]
"""The same as :func:`version_of`, much faster, for tensors that are no inference tensors."""


_RELEASED = object()
"""An entry that no later call uses; no argument is the same object."""


class PathChanged(Exception):
    """A forward pass makes another call than the recorded one."""


class PathFollower:
    """The part of a torch function mode that compares calls with recorded ones.

    Args:
        path: The recorded calls.
        leaves: The inputs, parameters, buffers and tensors among the attributes.
    """

    def follow(self, path: KnownPath, leaves: list[Tensor]) -> None:
        """Begin a forward pass."""
        self._version_of: Callable[[Tensor], int] = _VERSION
        try:
            self._versions = list(map(_VERSION, leaves))
        except RuntimeError:  # a leaf is an inference tensor
            self._version_of, self._versions = version_of, list(map(version_of, leaves))
        self._entries: list[Any] = [*leaves, *[None] * path.made, *path.constants]
        self._path, self._place, self._is_lost = path, 0, False

    def _next_call(self, func: Any, values: Sequence[Any], kwargs: Any) -> KnownCall | None:
        """Return the recorded call if it has the same function and arguments; ``None`` if it has another function."""
        calls, place = self._path.calls, self._place
        known = calls[place] if place < len(calls) else None
        if known is None or known.function != func:
            return None
        self._place = place + 1
        if not self._has_arguments(known, values) or tuple(kwargs) != known.names:
            self._lose()
        if known.marks is not None and not _has_marks(known, values, known.marks):
            self._lose()
        return known

    def _note(self, known: KnownCall, result: Any) -> None:
        """Compare the result of a call with the recorded one, and how often its arguments were changed in place."""
        versions, version, entries = self._versions, self._version_of, self._entries
        is_tensor = type(result) is Tensor
        if is_tensor:
            if result.dtype is not known.dtype or result.shape != known.shape:
                self._lose()
        elif known.dtype is not None or described(result) != known.results:
            self._lose()
        if not self._path.is_pure:
            for number, changes in known.tensors:
                if version(entries[number]) - versions[number] != changes:
                    self._lose()
        if is_tensor:
            entries[len(versions)] = result
            versions.append(version(result))
        else:
            for made in tensors_in(result):
                entries[len(versions)] = made
                versions.append(version(made))
        for number in known.released:
            entries[number] = _RELEASED

    @property
    def is_lost(self) -> bool:
        """Whether the path has changed."""
        return self._is_lost

    def _lose(self) -> NoReturn:
        """Note that the path has changed, and raise the exception, which the model may catch."""
        self._is_lost = True
        raise PathChanged

    def _harmless(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a call that is not recorded since it returns no tensor."""
        name = getattr(func, "__name__", "")
        if name not in _HARMLESS and not (name == "__get__" and func in _HARMLESS_ATTRIBUTES):
            self._lose()
        return func(*args, **kwargs)

    def _has_arguments(self, known: KnownCall, values: Sequence[Any]) -> bool:
        """Return whether the arguments are the recorded tensors and constants, and gradients are on or off as recorded."""
        if len(values) != len(known.numbers) or self._is_lost:
            return False
        expected = known.pick(self._entries)
        if not all(map(is_, values, expected)):
            for value, number, entry in zip(values, known.numbers, expected, strict=True):
                if type(entry) is TensorList:
                    if not entry.matches(value, self._entries):
                        return False
                elif value is not entry and (number >= 0 or not is_equal(value, entry)):
                    return False
        usual = torch.is_grad_enabled() is known.has_gradients and not torch.is_inference_mode_enabled()
        return usual and not storing_hooks(True)

    def require_end(self, logits: Tensor) -> None:
        """Require that the model made all calls, and that the logits are the recorded tensor.

        If the recorded calls change no tensor in place, all tensors must have the version that they had when they were made.
        So they had it in each call too, in which it is therefore not compared.

        Raises:
            PathChanged: If it did not.
        """
        number, changes = self._path.end
        if self._is_lost or self._place != len(self._path.calls) or logits is not self._entries[number]:
            raise PathChanged
        if version_of(logits) - self._versions[number] != changes:
            raise PathChanged
        if self._path.is_pure and not self.is_unchanged():
            raise PathChanged

    def release(self) -> None:
        """Release all tensors: the graphs of the results may have hooks that refer to this object, which no garbage collector sees."""
        self._entries = []

    def is_unchanged(self) -> bool:
        """Return whether no leaf or result was changed in place."""
        return list(map(self._version_of, self._entries[: len(self._versions)])) == self._versions


def _has_marks(known: KnownCall, values: Sequence[Any], marks: int) -> bool:
    """Return whether a mask selects as many rows of each sample as the recorded one."""
    mask = selecting_mask(known.function, values)
    assert known.shape is not None
    return mask is not None and marks_so_many(mask, marks, known.shape[0] // marks)


class PathCheck(PathFollower, TorchFunctionMode):
    """Runs a forward pass unchanged, and requires that it makes recorded calls.

    Args:
        path: The recorded calls.
        leaves: The inputs, parameters, buffers and tensors among the attributes.
    """

    def __init__(self, path: KnownPath, leaves: list[Tensor]) -> None:
        super().__init__()
        self.follow(path, leaves)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call, which must be the recorded one."""
        kwargs = kwargs or {}
        if type(func) is OpOverload:
            return self._operator(func, args, kwargs)
        values = (*args, *kwargs.values()) if kwargs else args
        known = self._next_call(func, values, kwargs)
        if known is None:
            return self._harmless(func, args, kwargs)
        result = self._run(known, values, args, kwargs)
        self._note(known, result)
        return result

    def _operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator of the dispatcher, which is not a call of the model."""
        return func(*args, **kwargs)

    def _run(self, known: KnownCall, values: Sequence[Any], args: Any, kwargs: Any) -> Any:
        """Return the result of a recorded call."""
        return known.function(*args, **kwargs)


class _PathRecording(Recording):
    """Records every torch call inside the block in an outline, and call by call.

    Args:
        outline: The outline.
        recorder: Gets the calls.
    """

    def __init__(self, outline: Outline, recorder: PathRecorder) -> None:
        super().__init__(outline)
        self._recorder = recorder

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Record one call."""
        self._recorder.add(self.outline, func, args, kwargs, result, 0, 0)
        super().note(func, args, kwargs, result)


def forward_alone(task: Task, number: int, state: ForwardState) -> tuple[Tensor, int, KnownPath | None]:
    """Return the logits ``(1, C)`` of one sample alone, a number for the calls of its forward pass, and these calls.

    The calls are ``None`` if they cannot be compared one by one.

    Args:
        task: The batch.
        number: The number of the sample.
        state: The present state of the model.
    """
    single = task.picked([number])
    outline, recorder = Outline(single.leaves()), PathRecorder(single)
    try:
        with quiet_no_grad(True), torch.enable_grad(), _PathRecording(outline, recorder):
            logits = single.forward(repairs_norms=False)
        outline.end(logits)
        recorder.end(outline, logits)
        return logits.detach(), outline.path, recorder.path()
    finally:
        state.restore()


def logits_on_path(task: Task, number: int, path: KnownPath) -> Tensor | None:
    """Return the logits ``(1, C)`` of one sample alone if its forward pass makes known calls, else ``None``.

    The caller restores the model.

    Args:
        task: The batch.
        number: The number of the sample.
        path: The calls.
    """
    inputs = task.inputs_at([number])
    leaves = leaves_of(task, inputs)
    if leaves is None or len(leaves) != path.leaves:
        return None
    check = PathCheck(path, leaves)
    try:
        with torch.enable_grad(), check:
            logits = task.logits_of(inputs, 1)
        check.require_end(logits)
    except PathChanged:
        return None
    return logits.detach()
