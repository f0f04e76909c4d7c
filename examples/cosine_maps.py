"""Cosine similarity maps of input gradients (GGA, Schwinn et al. 2021), and the score made from them."""

from __future__ import annotations

import torch
from _digits import digit_loaders, trained_classifier

import lightning_gradmetrics as lgm


def main() -> None:
    """Print the mean similarity between classes for known and for unknown digits."""
    loaders = digit_loaders()
    model = trained_classifier(loaders).eval()
    for name in ("test", "unknown"):
        images = next(iter(loaders[name]))[0]
        maps = lgm.cosine_similarity_maps(model, images)  # (N, C, C)
        others = ~torch.eye(maps.shape[1], dtype=torch.bool)
        scores = lgm.score(model, images, ["gga", "gradnorm"])
        print(
            f"{name:8} maps {tuple(maps.shape)}, mean similarity {maps[:, others].mean():.3f}, "
            f"mean gga {scores['gga'].mean():.3f}, mean gradnorm {scores['gradnorm'].mean():.1f}"
        )


if __name__ == "__main__":
    main()
