"""The gradients of the cross-entropy with respect to a few logits, in one call of a compiled kernel.

Some twenty torch calls do the same, which takes longer than the forward pass of a small model.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.jobs import ResidualJob
from lightning_gradmetrics.engine.kernels.library import library_for
from lightning_gradmetrics.gradients.objectives import IGNORED

__all__ = ["class_residuals"]

LARGEST = 2**14
"""Largest number of logits; for more, torch's vectorised functions are faster."""


def class_residuals(logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Return the gradients of the cross-entropy, scaled by a power of two per sample, and the factors that undo the scale.

    Args:
        logits: ``(N, C)``.
        labels: Class indices ``(N,)``; ``None`` for the class of the largest logit.

    Returns:
        ``(N, C)``, with the largest magnitude of each row in [1/2, 1), and ``(N,)``; ``None`` if plain torch must be used.
    """
    samples, classes = logits.shape
    if not _is_supported(logits) or (labels is not None and not _are_indices(labels, samples)):
        return None
    library = library_for(logits.dtype)
    if library is None:
        return None
    gradient = torch.empty(logits.shape, dtype=logits.dtype)
    undo = torch.empty(samples, dtype=torch.float64)
    job = ResidualJob(
        logits=logits.data_ptr(),
        labels=None if labels is None else labels.data_ptr(),
        gradient=gradient.data_ptr(),
        undo=undo.data_ptr(),
        samples=samples,
        classes=classes,
        step=logits.stride(0),
        ignored=IGNORED,
    )
    library.class_residuals(ctypes.byref(job), None, 1)
    return None if job.unusual else (gradient, undo)


def _is_supported(logits: Tensor) -> bool:
    is_on_cpu = logits.is_cpu and logits.layout == torch.strided
    return is_on_cpu and logits.shape[1] > 1 and logits.stride(1) == 1 and 0 < logits.numel() <= LARGEST


def _are_indices(labels: Tensor, size: int) -> bool:
    is_plain = labels.dtype == torch.int64 and labels.device.type == "cpu" and labels.is_contiguous()
    return is_plain and labels.shape == (size,)
