"""Reads the logits of one sample whose axis the model has removed, as ``squeeze()`` without an axis does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import Inputs, tensors_in
from lightning_gradmetrics.scoring.batch import ObservedBatch
from lightning_gradmetrics.scoring.repeated_call import RepeatedCall

__all__ = ["SingleRowReader", "is_one_sample"]


def is_one_sample(inputs: Inputs | None, size: int | None) -> bool:
    """Return whether the inputs are those of one sample.

    Args:
        inputs: The inputs; ``None`` if they are unknown.
        size: The number of samples; ``None`` for the length of the first input.

    Example:
        >>> import torch
        >>> is_one_sample(torch.zeros(1, 4), None), is_one_sample(None, 2)
        (True, False)
    """
    if size is not None:
        return size == 1
    first = next(tensors_in(inputs), None)
    return first is not None and bool(first.ndim) and len(first) == 1


class SingleRowReader:
    """Reads the logits of one sample whose axis the model may have removed.

    Args:
        model: The model.
        logits_fn: Returns the logits from the model's output.
    """

    def __init__(self, model: nn.Module, logits_fn: Callable[[Any], Tensor]) -> None:
        self.model, self.logits_fn = model, logits_fn
        self._shape: tuple[int, ...] | None = None

    def with_row(self, logits: Tensor, called: nn.Module, inputs: Inputs | None, size: int | None) -> Tensor:
        """Return logits ``(C, *P)`` of one sample as ``(1, C, *P)``, and others unchanged.

        Two copies of the sample must have logits ``(2, C, *P)``: logits of several rows may also be those of a model that returns
        several rows for each sample.

        Args:
            logits: What the model returned.
            called: The module that was called.
            inputs: The arguments of that call.
            size: The number of samples, if it is known.
        """
        has_row = logits.ndim > 1 and len(logits) == 1
        if has_row or not logits.ndim or inputs is None or not is_one_sample(inputs, size):
            return logits
        shape = tuple(logits.shape)
        if shape != self._shape:
            if self._shape_of_two(logits, called, inputs) != (2, *shape):
                return logits
            self._shape = shape
        return logits.unsqueeze(0)

    def _shape_of_two(self, logits: Tensor, called: nn.Module, inputs: Inputs) -> tuple[int, ...]:
        """Return the shape of the logits of two copies of the sample; an empty one if the model does not run on them."""
        repeated = RepeatedCall(self.model, ObservedBatch(inputs, logits, called=called), None, self.logits_fn)
        flags = [bool(tensor.ndim) and len(tensor) == 1 for tensor in tensors_in(inputs)]
        try:
            return tuple(repeated.logits([0, 0], flags).shape) if any(flags) else ()
        except Exception:  # any error of the model
            return ()
