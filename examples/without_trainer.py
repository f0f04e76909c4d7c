"""
Without a Trainer
=================

Compute scores and gradient statistics of any classifier in plain torch.
"""

from __future__ import annotations

import torch
from torch import nn

import lightning_gradmetrics as lgm


def main() -> None:
    """Score a batch of random images with a random network."""
    torch.manual_seed(0)
    features = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*features, nn.Linear(8, 10)).eval()
    images = torch.randn(4, 3, 32, 32)

    scores = lgm.score(model, images, ["max_softmax", "gradnorm", "gradnorm(target='all')"])
    for name, values in scores.items():
        print(f"{name:24}", [round(value, 4) for value in values.tolist()])

    statistics = lgm.gradient_statistics(model, images, "pseudo_label", per_parameter=True)
    for name, norms in zip(statistics.names, statistics.norm(2).T, strict=True):
        print(f"{name:24}", [round(value, 4) for value in norms.tolist()])


if __name__ == "__main__":
    main()
