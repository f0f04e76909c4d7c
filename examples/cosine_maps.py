"""
Cosine similarity maps
======================

Compute cosine similarity maps of input gradients, and a score derived from them.

The method is geometric gradient analysis (GGA, Schwinn et al. 2021).
"""

from __future__ import annotations

import torch
from _digits import digit_loaders, trained_classifier
from matplotlib import pyplot

import lightning_gradmetrics as lgm


def main() -> None:
    """Print and draw the mean similarity between classes for known and for unknown digits."""
    loaders = digit_loaders()
    model = trained_classifier(loaders).eval()
    figure, axes = pyplot.subplots(1, 2, figsize=(7, 3.4), layout="constrained")
    for name, axis in zip(("test", "unknown"), axes, strict=True):
        images = next(iter(loaders[name]))[0]
        maps = lgm.cosine_similarity_maps(model, images)  # (N, C, C)
        off_diagonal = ~torch.eye(maps.shape[1], dtype=torch.bool)
        similarity = maps[:, off_diagonal].mean()
        scores = lgm.score(model, images, ["gga", "gradnorm"])
        print(
            f"{name:8} maps {tuple(maps.shape)}, mean similarity {similarity:.3f}, "
            f"mean gga {scores['gga'].mean():.3f}, mean gradnorm {scores['gradnorm'].mean():.1f}"
        )
        image = axis.imshow(maps.mean(0).numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set(title=f"{name} digits", xlabel="class", ylabel="class")
    figure.colorbar(image, ax=axes, label="mean cosine similarity")
    figure.savefig("maps.png")


if __name__ == "__main__":
    main()
