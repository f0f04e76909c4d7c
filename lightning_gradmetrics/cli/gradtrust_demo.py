"""Reproduces GradTrust's demo for one image."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradmetrics.classifier.forward import check_model
from lightning_gradmetrics.cli.data.images import IMAGENET_MEAN, IMAGENET_STD
from lightning_gradmetrics.scoring.registry import resolve
from lightning_gradmetrics.scoring.scorer import Scorer
from lightning_gradmetrics.scoring.step import observed

__all__ = ["demo_block", "demo_values", "read_image"]

Turn = Callable[[float], float]


def _negative(score: float) -> float:
    return -score


def _one_minus(score: float) -> float:
    return 1 - score


LINES: dict[str, tuple[str, Turn]] = {
    "GradTrust": ("gradtrust", _negative),
    "Softmax Confidence": ("max_softmax", _one_minus),
    "Entropy": ("entropy", _negative),
    "Margin": ("margin", _negative),
    "Log-likelihood": ("log_likelihood", _negative),
    "ODIN": ("odin", _one_minus),
    "MC-Dropout": ("mc_dropout", _negative),
    "Purview (Initial layers)": ("purview(part=initial)", _negative),
    "Purview (Final layers)": ("purview(part=final)", _negative),
    "Grad Norm": ("gradnorm_kl", _negative),
}
"""The lines of the demo: a score, and the function that turns it into the printed confidence."""

BRACKETED = ("Softmax Confidence", "Entropy", "Margin", "MC-Dropout")
"""The lines that the demo prints as arrays of one sample."""


def read_image(path: str | Path, size: int = 224) -> Tensor:
    """Return an image as the demo reads it: resized to a square by bilinear interpolation and normalised as for ImageNet.

    Args:
        path: The image.
        size: The width and height of the result.

    Returns:
        ``(1, 3, size, size)``.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no image {str(path)!r}: give the path of a picture, as in image=bird.jpg")
    with Image.open(file) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
    pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    return (pixels - mean) / std


def demo_values(model: nn.Module, image: Tensor) -> tuple[int, dict[str, float]]:
    """Return the prediction for one image, and the values of the demo with the demo's signs: higher = more trust.

    Args:
        model: A classifier in eval mode.
        image: ``(1, ...)``.
    """
    scorer = Scorer(resolve({line: score for line, (score, _) in LINES.items()}))
    check_model(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no dropout module")  # the block ends with a note about this
        evidence = scorer.evidence(model, observed(scorer, model, image))
    values = {}
    for score in scorer.scores:
        _, turn = LINES[score.name]
        values[score.name] = turn(score(evidence).item()) + 0.0  # -0.0 becomes 0.0
    return int(evidence.given_logits.argmax(1)), values


def demo_block(model: nn.Module, image: Tensor, notes: Sequence[str] = ()) -> str:
    """Return the demo's text: prediction, GradTrust and its comparison metrics, higher = more trust; then notes.

    Args:
        model: A classifier in eval mode.
        image: ``(1, ...)``.
        notes: Additional lines at the end.
    """
    prediction, values = demo_values(model, image)
    lines = [f"The prediction is : [{prediction}] with GradTrust: {values.pop('GradTrust'):.7g}", "Comparison Metrics:"]
    for line, value in values.items():
        lines.append(f"{line}: [{value:.7g}]" if line in BRACKETED else f"{line}: {value:.7g}")
    if not _has_dropout(model):
        lines.append("The model has no dropout module with p > 0: MC-Dropout equals the entropy.")
    return "\n".join([*lines, *notes])


def _has_dropout(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules())
