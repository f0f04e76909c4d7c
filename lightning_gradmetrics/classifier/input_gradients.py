"""Computes the logits as a differentiable function of the input, for scores that use input gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import call, logits_of
from lightning_gradmetrics.classifier.frozen_norm import frozen_batch_norms

__all__ = ["check_floats", "differentiable_logits"]


def check_floats(inputs: Any, who: str) -> None:
    """Refuse inputs that are not one tensor of floats.

    Args:
        inputs: The model's inputs.
        who: The subject of the error message, a plural such as ``"the scores"``.

    Raises:
        TypeError: If the inputs are not a tensor of floats.
    """
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        return
    kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
    raise TypeError(
        f"{who} need one float tensor (N, ...) as the input, not {kind}. Convert integer images "
        "with x.float() / 255; wrap a model of several inputs, or of tokens, in a model that takes their embedding"
    )


def differentiable_logits(model: nn.Module, inputs: Tensor, who: str) -> tuple[Tensor, Tensor]:
    """Return a leaf tensor with the values of the inputs, and the logits as a function of it.

    The model may modify its input in place.

    Args:
        model: A classifier, within :func:`lightning_gradmetrics.classifier.forward.gradients_enabled`.
        inputs: Inputs ``(N, ...)``, floats.
        who: The subject of the error message, a plural such as ``"the scores"``.

    Returns:
        The leaf ``(N, ...)`` and the logits ``(N, C)``.

    Raises:
        ValueError: If the logits do not depend on the inputs.
    """
    leaf = (inputs.clone() if inputs.is_inference() else inputs).detach().requires_grad_()
    with frozen_batch_norms(model, len(leaf)):
        logits = logits_of(call(model, leaf.clone()))
    if not _depends_on(logits, leaf):
        raise ValueError(
            f"the logits of {type(model).__name__} do not depend on its inputs by autograd; {who} "
            "need their gradient. Remove detach(), no_grad() or inference_mode() from its forward"
        )
    return leaf, logits


def _depends_on(result: Tensor, leaf: Tensor) -> bool:
    """Return whether a tensor depends on a leaf by autograd; parameters may give it a graph all the same."""
    waiting: list[Any] = [result.grad_fn]
    seen: set[Any] = {None}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        if getattr(node, "variable", None) is leaf:
            return True
        seen.add(node)
        for before, _ in node.next_functions:
            waiting.append(before)
    return False
