"""Resizes the logits of a segmentation model to the size of its labels."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lightning_gradmetrics.classifier.carry import Carry
from lightning_gradmetrics.gradients.head_features import HeadFeatures
from lightning_gradmetrics.scoring.batch import ObservedBatch

__all__ = ["at_size"]


def at_size(batch: ObservedBatch, size: tuple[int, ...]) -> ObservedBatch:
    """Return the batch with its logits resized bilinearly to a size, as ``post_process_semantic_segmentation`` does.

    The same resizing is applied to the head's features, so gradients are exactly those of the resized logits.

    Args:
        batch: A batch of a segmentation model.
        size: Height and width.

    Raises:
        ValueError: If the model caps its logits.
    """
    if tuple(batch.logits.shape[2:]) == size:
        return batch
    if isinstance(batch.slope, Tensor):
        raise ValueError(
            f"the model caps its logits, and they are {tuple(batch.logits.shape[2:])} for labels {size}: the gradient of the head "
            "of resized capped logits has no closed form. Return logits of the labels' size, or choose scores of the logits"
        )
    carry = Carry(size=size, mode="bilinear", align_corners=False)
    features = batch.features
    if isinstance(features, HeadFeatures):
        features = features.carried(carry)
    return replace(batch, logits=carry(batch.logits), features=features)
