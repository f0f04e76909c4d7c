"""Checks that scores can be computed from a batch: its inputs, its labels and the model's parameters."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lightning_gradmetrics.scoring.agreement import are_close

__all__ = [
    "NO_SAMPLE_AXIS",
    "check_first_rows",
    "check_parameters",
    "has_two_sample_axes",
    "is_row_wise",
    "label_problem",
]

NO_SAMPLE_AXIS = (
    "have no sample axis: scores over more than the head need inputs with one row per sample on the first axis. Logit and "
    "head scores work with any inputs; for samples on another axis, as in (T, N, ...), pass sample_axis= to "
    "score or GradientMetrics, or transpose in the model's forward"
)
"""Why inputs cannot be split into samples."""


def is_row_wise(tensor: Tensor, size: int) -> bool:
    """Return whether a tensor has one row per sample."""
    return bool(tensor.ndim) and len(tensor) == size


def has_two_sample_axes(tensor: Tensor) -> bool:
    """Return whether the first two axes have equal lengths, so that the shape does not show which one is the samples."""
    return tensor.ndim > 1 and tensor.shape[0] == tensor.shape[1]


def check_first_rows(forward: Callable[[], Tensor], expected: Tensor, kind: str) -> None:
    """Refuse inputs whose first rows have different logits alone than in the batch."""
    message = f"the first {len(expected)} rows of the inputs of {kind}, passed alone, "
    remedy = (
        "so the rows of the first axis are not the samples, or samples depend on each other. Scores over more than the head "
        "need inputs with one row per sample on the first axis: pass sample_axis= to score or GradientMetrics if it is another "
        "one; logit and head scores work with any inputs"
    )
    try:
        logits = forward()
    except Exception as error:
        raise ValueError(f"{message}fail with {type(error).__name__}: {error}; {remedy}") from error
    if not are_close(logits, expected):
        raise ValueError(f"{message}give different logits than in their batch, {remedy}")


def check_parameters(model: nn.Module) -> None:
    """Refuse parameters that can have no gradient."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"the parameter {name!r} was created in torch.inference_mode, so it has no gradient. Create the model, and call "
                "lazy layers for the first time, outside of it, or pass Trainer(inference_mode=False)"
            )


def label_problem(labels: Tensor | None, size: int, classes: int, place: str) -> str | None:
    """Return a description of the problem with the labels of a batch, or ``None``."""
    remedy = "remove the score, or score labelled data only: pass targets=, or return batches (inputs, labels)"
    if labels is None:
        return f"true labels, but there are none{place}: {remedy}"
    if labels.shape != (size,) or labels.is_floating_point() or labels.is_complex():
        return f"true labels ({size},), integers; these are {tuple(labels.shape)}, {labels.dtype}{place}"
    unknown = int(((labels < 0) | (labels >= classes)).sum())
    if not unknown:
        return None
    return (
        f"the true label of every sample, but {unknown} of {size} samples of a batch{place} have none "
        f"from 0 to {classes - 1}: {remedy}"
    )
