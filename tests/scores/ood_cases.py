"""The rows of the test table for pytorch-ood: its detectors called directly, on the model, with the same data to fit on."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from pytorch_ood import detector as library
from torch import Tensor, nn

from lightning_gradmetrics.scoring.totals import Tensors
from tests.models import images, vectors
from tests.scores.fits import fit_batches

Maker = Callable[[nn.Module], Any]


class Encoder(nn.Module):
    """The part of a model before its head, with its output in float32, as in pytorch-ood's own code."""

    def __init__(self, model: nn.Module, maps: bool = False) -> None:
        super().__init__()
        self.layers, self.maps = nn.Sequential(*list(model.children())[:-1]), maps

    def forward(self, x: Tensor) -> Tensor:
        found = self.layers(x.to(next(self.layers.parameters()).dtype)).float()
        return found[:, :, None, None] if self.maps else found


def head(model: nn.Module) -> nn.Linear:
    """A copy of the head in float32."""
    last = list(model.children())[-1]
    assert isinstance(last, nn.Linear)
    copy = nn.Linear(last.in_features, last.out_features)
    with torch.no_grad():
        copy.weight.copy_(last.weight)
        copy.bias.zero_() if last.bias is None else copy.bias.copy_(last.bias)
    return copy


def flat(model: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), head(model))


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers with a weight matrix before the head."""
    return [layer for layer in list(model.children())[:-1] if isinstance(layer, (nn.Conv2d, nn.Linear))]


def convolution(model: nn.Module) -> list[nn.Module]:
    return [next(iter(model.children()))]


PLAIN: dict[str, Maker] = {
    "GEN": lambda m: library.GEN(m),
    "GEN,gamma=0.5,M=2": lambda m: library.GEN(m, gamma=0.5, M=2),
    "ASH": lambda m: library.ASH(Encoder(m, True), flat(m)),
    "ASH,variant='ash-b',percentile=0.3": lambda m: library.ASH(Encoder(m, True), flat(m), "ash-b", 0.3),
    "ReAct,threshold=0.2": lambda m: library.ReAct(Encoder(m, True), flat(m), threshold=0.2),
    "GradNorm": lambda m: library.GradNorm(m),
    "ODIN,eps=0.01": lambda m: library.ODIN(m, eps=0.01),
}
"""Detectors that are not fitted."""

FITTED_MAKERS: dict[str, Maker] = {
    "KNN,k=3": lambda m: library.KNN(Encoder(m), k=3),
    "KNN,k=2,normalize=False,metric=manhattan": lambda m: library.KNN(
        Encoder(m), k=2, normalize=False, metric="manhattan"
    ),
    "ViM,d=2": lambda m: library.ViM(Encoder(m), 2, head(m).weight, head(m).bias),
    "ViM": lambda m: library.ViM(Encoder(m), head(m).in_features // 2, head(m).weight, head(m).bias),
    "Mahalanobis": lambda m: library.Mahalanobis(Encoder(m)),
    "ReAct": lambda m: library.ReAct(Encoder(m, True), flat(m)),
    "ReAct,percentile=0.5": lambda m: library.ReAct(Encoder(m, True), flat(m), percentile=0.5),
    "NNGuide": lambda m: library.NNGuide(Encoder(m), head(m)),
    "NNGuide,k=3": lambda m: library.NNGuide(Encoder(m), head(m), k=3),
    "NACUE": lambda m: library.NACUE(m, blocks(m)),
    "NACUE,layers='0',m_bins=10,o_star=5": lambda m: library.NACUE(m, convolution(m), m_bins=10, o_star=5),
    "KLMatching": lambda m: library.KLMatching(m),
}
"""Detectors that are fitted."""


def name(detector: str) -> str:
    """The score's name in the table."""
    return f"pytorch_ood(detector={detector})"


def direct(make: Maker) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda model, x: make(model).predict(x)


def direct_fitted(make: Maker) -> Callable[[nn.Module, Tensor, Tensors], Tensor]:
    """A detector fitted by its own ``fit`` on a loader of the data that scores are fitted on."""

    @lru_cache(maxsize=1)
    def fitted(model: nn.Module, width: int) -> Any:
        batches, _ = fit_batches(model, images if width > 2 else vectors)
        return make(model).to("cpu").fit(batches)

    return lambda model, x, state: fitted(model, x.ndim).predict(x)


CASES = {name(detector): direct(make) for detector, make in PLAIN.items()}
FITTED = {name(detector): direct_fitted(make) for detector, make in FITTED_MAKERS.items()}
