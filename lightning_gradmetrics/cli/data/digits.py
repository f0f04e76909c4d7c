"""Data that needs no download: scikit-learn's handwritten digits and photographs."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_gradmetrics.cli.data.sets import EvaluationData

__all__ = ["digits"]

SIZE = 8
"""Width and height of an image."""


def digits(train: int = 120, fit: int = 250, patches: int = 400, seed: int = 0) -> EvaluationData:
    """Return digits 0 to 7 to classify, digits 8 and 9 as near OOD data and patches of photographs as far OOD data.

    Scores are fitted on further digits and, as OOD data, a fifth as many patches as are scored.

    Args:
        train: The number of images of digits 0 to 7 to train on, small so that the model makes errors. The rest is
            scored.
        fit: The number of images of digits 0 to 7 to fit scores on, which are neither trained on nor scored.
        patches: The number of patches from scikit-learn's two photographs.
        seed: The seed of the split and of the patches.

    Returns:
        Datasets ``digits`` (``id``), ``digits_8_9`` (``near``) and ``photos`` (``far``): grey images ``(1, 8, 8)`` in
        [0, 1].

    Example:
        >>> data = digits()
        >>> {name: len(dataset) for name, dataset in data.sets.items()}
        {'digits': 1073, 'digits_8_9': 354, 'photos': 400}
    """
    generator = np.random.default_rng(seed)
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().view(-1, 1, SIZE, SIZE) / 16
    classes = torch.from_numpy(labels).long()
    known = generator.permutation(np.flatnonzero(labels < 8))
    if train < 1 or fit < 0 or train + fit >= len(known):
        raise ValueError(
            f"train is {train} and fit is {fit}; train must be at least 1 and fit at least 0, and together they must "
            f"be fewer than the {len(known)} digits 0 to 7: the rest is scored"
        )
    held_out, scored = known[train : train + fit], known[train + fit :]
    photographs = _patches(patches + patches // 5, generator)
    unknown = np.flatnonzero(labels >= 8)
    return EvaluationData(
        sets={
            "digits": TensorDataset(pixels[scored], classes[scored]),
            "digits_8_9": TensorDataset(pixels[unknown], torch.full((len(unknown),), -1)),
            "photos": TensorDataset(photographs[:patches], torch.full((patches,), -1)),
        },
        roles={"digits": "id", "digits_8_9": "near", "photos": "far"},
        classes=tuple("01234567"),
        train=TensorDataset(pixels[known[:train]], classes[known[:train]]),
        descriptions={
            "digits": "handwritten digits 0 to 7, held out",
            "digits_8_9": "handwritten digits 8 and 9, classes the model never saw",
            "photos": "patches of two photographs, in grey",
        },
        fit={
            "digits_fit": TensorDataset(pixels[held_out], classes[held_out]),
            "photos_fit": TensorDataset(photographs[patches:], torch.full((patches // 5,), -1)),
        },
        fit_roles={"digits_fit": "id", "photos_fit": "far"},
    )


def _patches(count: int, generator: np.random.Generator) -> Tensor:
    """Return grey square patches of the photographs at random positions and sizes, shrunk to ``(count, 1, 8, 8)``."""
    photographs = []
    for photograph in load_sample_images().images:
        photographs.append(torch.tensor(photograph, dtype=torch.float32).mean(2) / 255)
    patches = []
    for number in range(count):
        image = photographs[number % len(photographs)]
        side = int(generator.integers(2, 13)) * SIZE
        height, width = image.shape
        top, left = int(generator.integers(0, height - side)), int(generator.integers(0, width - side))
        patch = image[None, top : top + side, left : left + side]
        patches.append(torch.nn.functional.adaptive_avg_pool2d(patch, SIZE))
    return torch.stack(patches)
