"""Checks of logits, and of labels at positions, before scoring."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.classifier.forward import as_rows, with_two_classes
from lightning_gradmetrics.gradients.objectives import IGNORED
from lightning_gradmetrics.scoring.batch import ObservedBatch
from lightning_gradmetrics.scoring.recipes import Score

__all__ = [
    "OUTLIER",
    "VOID",
    "SingleLogits",
    "check_logits",
    "known_labels",
    "not_per_position",
    "two_columns",
    "with_two_columns",
]

VOID = 255
"""The label of positions without a class in most segmentation datasets."""

OUTLIER = -200
"""The label that marks an out-of-distribution pixel; like every negative label, it is not a class."""

LOOKED_AT = 4096
"""Number of positions of a batch at which logits are checked for being probabilities."""

FEW_ROWS = 8
"""With fewer rows, the logits of a model with one logit may all be between 0 and 1."""

LIKE_SIGMOID = (
    "the model's only logit is between 0 and 1 everywhere, as behind a sigmoid: if it is a probability, pass "
    "logits_fn=torch.logit, or name the head, as in head='fc', so that its output is taken"
)


def two_columns(logits_fn: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """Return a callable from the model's output to the logits ``(0, z)`` of a model with one logit z."""

    def both(output: Any) -> Tensor:
        return with_two_classes(as_rows(logits_fn(output)))

    return both


def with_two_columns(batch: ObservedBatch) -> ObservedBatch:
    """Return the batch of a model with one logit z, with the logits ``(0, z)`` instead."""
    if batch.logits.ndim < 2 or batch.logits.shape[1] != 1 or not batch.logits.is_floating_point():
        return batch
    logits, head = with_two_classes(batch.logits), batch.head
    if head is not None:
        bias = None if head.bias is None else torch.cat([torch.zeros_like(head.bias), head.bias])
        head = replace(head, weight=torch.cat([torch.zeros_like(head.weight), head.weight]), bias=bias)
    return replace(batch, logits=logits, head=head, one_logit=True)


class SingleLogits:
    """Warns once if the first batches of a model with one logit are small, and each logit is between 0 and 1.

    Example:
        >>> seen, z = SingleLogits(), torch.tensor([[0.0, 0.5], [0.0, 3.0]])
        >>> seen.add(z)
        >>> seen.is_decided
        True
    """

    def __init__(self) -> None:
        self.is_decided = False
        self._rows = 0

    def add(self, logits: Tensor) -> None:
        """Read the logits ``(0, z)`` of a batch ``(N, 2)``; :func:`check_logits` reads those of large batches."""
        if self.is_decided:
            return
        z = logits[:, 1]
        self._rows += len(z)
        is_like_sigmoid = bool(((z > 0) & (z < 1)).all())
        self.is_decided = len(z) >= FEW_ROWS or not is_like_sigmoid or self._rows >= FEW_ROWS
        if self.is_decided and is_like_sigmoid and len(z) < FEW_ROWS:
            warnings.warn(LIKE_SIGMOID, stacklevel=3)


def not_per_position(scores: Sequence[Score], shape: tuple[int, ...]) -> str:
    """Return why scores that need the whole network have no value per position.

    Args:
        scores: The scores of the run; only those that need the whole network are named.
        shape: The shape of the positions of a sample.
    """
    of_gradients, of_probes = [], []
    for score in scores:
        if score.needs.gradients:
            of_gradients.append(score)
        elif score.needs.probes:
            of_probes.append(score)
    reasons = []
    if of_gradients or not of_probes:
        reasons.append(_shared_parameters(of_gradients, shape))
    if of_probes:
        reasons.append(
            f"{_named(of_probes)} not defined per position: other passes through the model, or its inner layers, have one "
            "value for each sample"
        )
    if len(shape) == 1:
        reasons.append(
            "lightning_gradmetrics.score_generation(model, prompts, answers, scores) returns scores of whole texts"
        )
    return f"{'; '.join(reasons)}. Per position there are scores of the logits and of the head, such as entropy and pseudo_label"


def _shared_parameters(scores: Sequence[Score], shape: tuple[int, ...]) -> str:
    """Return why gradients of parameters before the head have no value per position."""
    count = 1
    for size in shape:
        count *= size
    reason = (
        f"{_named(scores)} not defined per position: the {count} positions {shape} of a sample share all parameters before "
        "the head, so each position would need a separate backward pass"
    )
    if any("target" in score.recipe.defaults for score in scores):
        reason += "; target='head' takes the head's gradient, which each position has"
    return reason


def _named(scores: Sequence[Score]) -> str:
    names = ", ".join(score.name for score in scores)
    if not names:
        return "the profile is"
    return f"the score {names} is" if len(scores) == 1 else f"the scores {names} are"


def known_labels(labels: Tensor, logits: Tensor) -> Tensor:
    """Return the labels of positions ``(N, *P)``, int64, with -100 where a label is unknown: negative, or 255.

    Args:
        labels: ``(N, *P)``, or ``(N, 1, *P)``.
        logits: ``(N, C, *P)``.

    Raises:
        ValueError: If the labels have a different shape, or one is not a class.
    """
    shape, classes = (len(logits), *logits.shape[2:]), logits.shape[1]
    if labels.shape == (len(logits), 1, *logits.shape[2:]):
        labels = labels[:, 0]
    if tuple(labels.shape) != shape or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"the labels of the positions are {tuple(labels.shape)}, {labels.dtype}; expected whole numbers of shape {shape}"
        )
    unknown = labels < 0 if classes > VOID else (labels < 0) | (labels == VOID)
    wrong = (labels >= classes) & ~unknown
    if bool(wrong.any()):
        raise ValueError(
            f"a position has the label {int(labels[wrong][0])}, and the model has {classes} classes, 0 to {classes - 1}. "
            "An unknown label must be 255 or negative: replace every other label of ignored or unknown objects, as in "
            "labels.masked_fill(labels == 11, -1)"
        )
    return labels.long().masked_fill(unknown & (labels != OUTLIER), IGNORED)


def check_logits(logits: Tensor) -> None:
    """Refuse probabilities and tensors that cannot be logits; warn about log-probabilities and about a sigmoid.

    Raises:
        ValueError: If the logits are not ``(N, C)`` or ``(N, C, *P)`` with C at least 2, or are probabilities.
    """
    if logits.ndim < 2:
        raise ValueError(
            f"the logits have shape {tuple(logits.shape)}; expected (N, C), one row per sample and one column per class. "
            "If the model calls squeeze(), name its axes, or use flatten(1). Otherwise pass logits_fn=, a callable from the model's "
            "output to them"
        )
    if not logits.is_floating_point():
        raise ValueError(
            f"the logits are whole numbers or complex ({logits.dtype}); expected floating-point logits (N, C): pass logits_fn=, a "
            "callable from the model's output to them"
        )
    if logits.shape[1] < 2:
        raise ValueError(f"the logits have shape {tuple(logits.shape)}, and a classifier has at least one column")
    rows = _some_rows(logits)
    if not rows.numel():
        return
    smallest, largest = torch.stack(rows.aminmax()).tolist()
    if not math.isfinite(smallest) or not math.isfinite(largest):
        return
    if smallest >= 0 and bool(((rows.sum(1) - 1).abs() < 1e-3).all()):
        raise ValueError(
            "the model returns probabilities, and scores need logits: name the head, as in head='fc', so that its output is "
            "taken, or pass logits_fn=, a callable from the model's output to its logits"
        )
    if (
        len(rows) >= FEW_ROWS
        and rows.shape[1] == 2
        and not rows[:, 0].any()
        and float(rows[:, 1].min()) > 0
        and largest < 1
    ):
        warnings.warn(LIKE_SIGMOID, stacklevel=3)
    if largest < 1e-4 and bool((rows.logsumexp(1).abs() < 1e-4).all()):
        warnings.warn(
            "the model seems to return log-probabilities; energy, max_logit and gradtrust need the raw logits: name the head, "
            "as in head='fc'",
            stacklevel=3,
        )


def _some_rows(logits: Tensor) -> Tensor:
    """Return the logits as rows ``(M, C)``: those of all samples, or of some positions."""
    if logits.ndim == 2:
        return logits.detach().float()
    flat = logits.detach().flatten(2)
    step = max(1, len(flat) * flat.shape[2] // LOOKED_AT)
    return flat[:, :, ::step].movedim(1, -1).reshape(-1, logits.shape[1]).float()
