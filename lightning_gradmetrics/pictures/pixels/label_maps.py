"""Converts label maps to one class per pixel, with ignored and out-of-distribution pixels marked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.objectives import IGNORED
from lightning_gradmetrics.scoring.logit_checks import OUTLIER

__all__ = ["marked_labels"]


def marked_labels(labels: Tensor, classes: int, ignored: Sequence[int], ood: Sequence[int]) -> Tensor:
    """Return label maps with -100 for ignored pixels, and -200 for out-of-distribution pixels.

    Args:
        labels: ``(N, H, W)``, int64.
        classes: The number of classes.
        ignored: The ignored labels; negative labels are always ignored.
        ood: The labels of out-of-distribution pixels.

    Raises:
        ValueError: If a label is neither a class nor ignored nor out-of-distribution.

    Example:
        >>> marked_labels(torch.tensor([[[0, 255, 3]]]), 2, (255,), (3,))
        tensor([[[   0, -100, -200]]])
    """
    is_ignored, is_ood = labels < 0, torch.zeros_like(labels, dtype=torch.bool)
    for value in ignored:
        is_ignored = is_ignored | (labels == value)
    for value in ood:
        is_ood = is_ood | (labels == value)
    wrong = (labels >= classes) & ~is_ignored & ~is_ood
    if bool(wrong.any()):
        raise ValueError(
            f"a pixel has the label {int(labels[wrong][0])}, and the model has {classes} classes, 0 to {classes - 1}. Name the "
            f"label in ignore_index= or in ood_labels=, as in pixels={{'ignore_index': {int(labels[wrong][0])}}}"
        )
    return labels.masked_fill(is_ignored, IGNORED).masked_fill(is_ood, OUTLIER)
