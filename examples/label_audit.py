"""
Audit labels
============

Find wrong labels with GraNd, the norm of the gradient of the labelled loss.
"""

from __future__ import annotations

import torch
from _digits import QUIET, digit_loaders, trained_classifier
from lightning.pytorch import Trainer
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

import lightning_gradmetrics as lgm


def main() -> None:
    """Plant five wrong labels in the test digits; list the samples with the largest scores."""
    loaders = digit_loaders()
    known = ConcatDataset([loaders["train"].dataset, loaders["held_out"].dataset])
    model = trained_classifier({"train": DataLoader(known, batch_size=64)})
    batches = [batch for _, batch in zip(range(3), loaders["test"], strict=False)]
    images, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    planted = torch.arange(5, 150, 30)
    labels[planted] = (labels[planted] + 3) % 8

    callback = lgm.GradientMetrics(["grand", "gradnorm"])
    loader = DataLoader(TensorDataset(images, labels), 64)
    Trainer(callbacks=[callback], **QUIET).test(model, loader, verbose=False)
    print("planted:", planted.tolist())
    for score, label_use in (("grand", "reads the label"), ("gradnorm", "ignores the label")):
        largest = callback.results.sort_by([(score, "descending")])[:10]
        print(f"ten largest {score}, which {label_use}:", largest["index"].to_pylist())


if __name__ == "__main__":
    main()
