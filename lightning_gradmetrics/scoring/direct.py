"""Scores one batch without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import Inputs, check_model, logits_in, tensors_in
from lightning_gradmetrics.classifier.sample_axis import SampleAxis, samples_first
from lightning_gradmetrics.scoring.direct_checks import check_call, given_labels
from lightning_gradmetrics.scoring.padding import padding_of, without_padding
from lightning_gradmetrics.scoring.registry import ScoreLike, resolve
from lightning_gradmetrics.scoring.scorer import Scorer
from lightning_gradmetrics.scoring.states import check_fitted
from lightning_gradmetrics.scoring.step import StepObserver

__all__ = ["score"]


def score(
    model: nn.Module,
    inputs: Inputs,
    scores: ScoreLike | Iterable[ScoreLike] | Mapping[str, ScoreLike],
    targets: Tensor | None = None,
    *,
    head: str | None = None,
    logits_fn: Callable[[Any], Tensor] = logits_in,
    engine: str = "auto",
    sample_axis: SampleAxis = 0,
) -> dict[str, Tensor]:
    """Return uncertainty scores of every sample, pixel or token, higher = more uncertain. Needs no Trainer.

    The shape of the logits determines the unit: ``(N, C)`` are samples, ``(N, C, H, W)`` pixels, and ``(N, T, V)`` the
    tokens of a language model. Below, ``*P`` is ``()``, ``(H, W)`` or ``(T,)``.

    Args:
        model: A classifier; batch norms must be in eval mode. It is left unchanged.
        inputs: A tensor ``(N, ...)``, a mapping (keyword arguments) or a sequence (positional arguments) of them.
        scores: Names such as ``"gradnorm"`` or ``"gradnorm(temperature=2.0)"``, :class:`Score` objects, or a mapping
            from column name to either.
        targets: True labels ``(N, *P)``, for scores that need them; at positions, 255 and negative labels mean unknown.
        head: The name of the classification head, a linear layer or a convolution; found automatically if its output is
            what the model returns, at positions also after resizing, cropping or averaging over flips.
        logits_fn: Returns the logits ``(N, C, *P)`` from the model's output, with the classes on axis 1.
        engine: The engine of the scores that need a backward pass, as in
            :func:`lightning_gradmetrics.gradient_statistics`.
        sample_axis: The axis of the samples in the inputs, such as 1 for ``(T, N, D)``; or a mapping from names or
            positions of arguments to axes, with 0 for the others, and ``None`` for an argument that all samples share
            and that may be as long as the batch, as in ``{"x": 1, "table": None}``.

    Returns:
        Each score ``(N, *P)`` by name, on the model's device; NaN where a score needs a label that is unknown, and at
        tokens that ``attention_mask`` marks as padding.

    Raises:
        ValueError: If a score is unknown or not fitted for this model, a batch norm is in train mode, the head
            cannot be found, or texts are padded on the left without ``position_ids``.
        TypeError: If the model is not a module, the inputs contain no tensor, or the model cannot be called with them.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).eval()
        >>> found = score(model, torch.randn(5, 2, 4), ["gradnorm", "entropy"])
        >>> {name: tuple(values.shape) for name, values in found.items()}
        {'gradnorm': (5,), 'entropy': (5,)}
    """
    scorer = Scorer(resolve(scores), head, logits_fn, engine)
    check_call(model, inputs, any("dropout" in s.name for s in scorer.scores))
    check_model(model)
    check_fitted(scorer.scores, model)
    if _is_empty(inputs):
        return {s.name: torch.empty(0, device=next(model.parameters()).device) for s in scorer.scores}
    with samples_first(model, inputs, sample_axis) as (placed, stated):
        batch = StepObserver(scorer, model).own(placed)
        batch = replace(batch, labels=given_labels(targets, batch.logits), sample_axis=stated)
        values = scorer(scorer.evidence(model, batch))
        return without_padding(values, padding_of(placed)) if batch.logits.ndim == 3 else values


def _is_empty(inputs: Inputs) -> bool:
    first = next(tensors_in(inputs), None)
    return first is not None and first.ndim > 0 and len(first) == 0
