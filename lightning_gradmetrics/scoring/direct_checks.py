"""Checks the arguments of ``score`` before the model runs."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_gradmetrics.classifier.forward import Inputs, tensors_in
from lightning_gradmetrics.classifier.labels import class_numbers
from lightning_gradmetrics.classifier.notices import RANDOM, first_time

__all__ = ["check_call", "given_labels"]


def check_call(model: Any, inputs: Any, expects_dropout: bool = False) -> None:
    """Refuse a model or inputs of the wrong type, and inputs that do not fit the forward; warn about active dropout.

    Args:
        model: The model.
        inputs: Its inputs.
        expects_dropout: Whether the scores require active dropout.

    Raises:
        TypeError: If the model is not a module, or it cannot be called with the inputs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}; expected a torch.nn.Module that returns logits (N, C)")
    _check_inputs(inputs)
    _check_signature(model, inputs)
    if not expects_dropout:
        _warn_of_dropout(model)


def _check_inputs(inputs: Any) -> None:
    """Refuse inputs that are often passed instead of tensors."""
    if isinstance(inputs, PackedSequence):  # a tuple, which would be read as positional arguments
        raise TypeError(
            "the inputs are a PackedSequence; pass it as the only positional argument, (inputs,), or padded"
        )
    if isinstance(inputs, Tensor):
        return
    array = next(_arrays(inputs), None)
    if array is not None and next(tensors_in(inputs), None) is None:
        raise TypeError(
            f"the inputs are a {type(array).__name__}; expected a tensor: pass torch.as_tensor(inputs), in the type that the "
            "model takes"
        )
    if not isinstance(inputs, (list, tuple, Mapping)):
        raise TypeError(
            f"the inputs are a {type(inputs).__name__}; expected a tensor (N, ...), a mapping or a sequence of tensors. For a "
            "dataloader call score for each batch, or use lightning_gradmetrics.GradientMetrics with a Trainer"
        )


def _arrays(inputs: Any) -> Iterator[Any]:
    """Yield the arrays in the inputs that are not tensors."""
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    entries = values if isinstance(inputs, (list, tuple, Mapping)) else [inputs]
    for entry in entries:
        if hasattr(entry, "__array__") and not isinstance(entry, Tensor):
            yield entry


def _check_signature(model: nn.Module, inputs: Inputs) -> None:
    """Refuse inputs that are not the arguments of the model's forward."""
    positional: list[Any] = [inputs]
    named: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        positional = [value for key, value in inputs.items() if isinstance(key, int)]
        named = {str(key): value for key, value in inputs.items() if not isinstance(key, int)}
    elif not isinstance(inputs, Tensor):
        positional = list(inputs)
    try:
        signature = inspect.signature(model.forward)
    except ValueError:  # a builtin
        return
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        raise TypeError(
            f"the inputs do not fit {type(model).__name__}.forward{signature}: {error}. A sequence is its positional arguments "
            "and a mapping its keyword arguments; pass labels as targets="
        ) from None


def _warn_of_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            first_time(model, RANDOM)  # the engine does not warn again
            warnings.warn(
                f"the dropout {name!r} is in train mode, so the scores are random: call model.eval() first",
                stacklevel=4,
            )
            return


def given_labels(targets: Any, logits: Tensor) -> Any:
    """Return the labels of samples as class numbers ``(N,)`` if they are unambiguous, otherwise unchanged.

    Example:
        >>> given_labels([2, 0], torch.zeros(2, 3)), given_labels(torch.eye(3)[:2], torch.zeros(2, 3))
        (tensor([2, 0]), tensor([0, 1]))
    """
    if targets is None:
        return None
    labels = targets if isinstance(targets, Tensor) else torch.as_tensor(targets)
    converted = class_numbers(labels, len(logits), logits.shape[1]) if logits.ndim == 2 else None
    return labels if converted is None else converted
