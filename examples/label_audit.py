"""
Audit labels
============

Find wrong labels in training data: the samples with the largest gradient of the labelled loss (GraNd).
"""

from __future__ import annotations

import torch
from _digits import QUIET, digit_loaders, trained_classifier
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradmetrics as lgm


def main() -> None:
    """Plant five wrong labels among test digits, and list the samples with the largest scores."""
    loaders = digit_loaders()
    model = trained_classifier(loaders)
    batches = [batch for _, batch in zip(range(3), loaders["test"], strict=False)]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    planted = torch.arange(5, 150, 30)
    labels[planted] = (labels[planted] + 3) % 8

    callback = lgm.GradientMetrics(["grand", "gradnorm"])
    Trainer(callbacks=[callback], **QUIET).test(model, DataLoader(TensorDataset(images, labels), 64), verbose=False)
    largest = lgm.largest(callback.results, "grand", n=10)
    print("planted:", planted.tolist())
    print("the ten largest grand:", largest["index"].to_pylist())
    print("gradnorm does not read the label:", lgm.largest(callback.results, "gradnorm", n=10)["index"].to_pylist())


if __name__ == "__main__":
    main()
