"""Geometric gradient analysis: scores of the cosine similarity maps of a sample's class saliency maps."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_gradmetrics.gradients import cosine_map_summaries
from lightning_gradmetrics.gradients.cosine_maps import cosine_similarity_maps
from lightning_gradmetrics.scores.detectors import (
    local_outlier_factor,
    lof_state,
    mahalanobis,
    mahalanobis_state,
    moment_sums,
)
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.fitted import Tensors, register_fitted
from lightning_gradmetrics.scoring.registry import register

__all__ = ["SUMMARIES", "ClassCosines", "gga", "gga_detector"]

PAPER = "Schwinn et al. 2021, arXiv:2102.12196"

MANY = 100
"""Classes from which the user is told what all of them cost."""

_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class ClassCosines:
    """A probe: the maps ``(N, K, K)``; arguments as in :func:`lightning_gradmetrics.cosine_similarity_maps`."""

    sign: bool = True
    rescale: bool = True
    classes: int | None = None

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        """The maps."""
        maps = cosine_similarity_maps(model, inputs, sign=self.sign, rescale=self.rescale, classes=self.classes)
        if self.classes is None and maps.shape[1] >= MANY and model not in _told:
            _told.add(model)
            warnings.warn(
                f"the cosine similarity maps of all {maps.shape[1]} classes take {maps.shape[1] - 1} backward passes a "
                "batch; classes=10 looks at each sample's 10 classes of largest logit",
                stacklevel=2,
            )
        return maps


def _maps(evidence: Evidence, sign: bool, rescale: bool, classes: int | None) -> Tensor:
    size = classes or evidence.logits.shape[1]
    return evidence.probe(ClassCosines(sign, rescale, classes), (size, size))


SUMMARIES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_cosine": cosine_map_summaries.mean_cosine,
    "std_cosine": cosine_map_summaries.std_cosine,
    "min_cosine": cosine_map_summaries.min_cosine,
    "max_cosine": cosine_map_summaries.max_cosine,
    "least_row_cosine": cosine_map_summaries.least_row_cosine,
    "effective_rank": lambda maps: -cosine_map_summaries.effective_rank(maps),
}


@register("gradient", PAPER)
def gga(
    evidence: Evidence,
    *,
    summary: str = "mean_cosine",
    classes: int | None = None,
    sign: bool = True,
    rescale: bool = True,
) -> Tensor:
    r"""A summary of the cosine similarity map: the mean cosine of two different classes' saliency maps.

    ``summary``: ``mean_cosine``, ``std_cosine``, ``min_cosine``, ``max_cosine``, ``least_row_cosine`` or
    ``effective_rank``, functions of :mod:`lightning_gradmetrics.gradients.cosine_map_summaries`; of the
    effective rank, which falls as uncertainty grows, the score is the negative. These
    directions are what was found, not a law. AUROC x 100 for errors, near and
    far data of a CIFAR-10 ResNet-20 (500, 250 and 250 images) was 81, 74 and 50 of ``mean_cosine``, 84, 70 and 68 of
    ``max_cosine``, and 93, 75 and 80 of ``max_softmax``; ``min_cosine`` and ``least_row_cosine`` were near chance. The
    paper fits a detector: ``gga_detector``.

    ``classes=k`` takes the k classes of each sample's largest logits: a backward pass a class makes all classes of a
    large model costly. ``sign`` and ``rescale`` are as in :func:`lightning_gradmetrics.cosine_similarity_maps`.
    """
    if summary not in SUMMARIES:
        raise ValueError(f"unknown summary {summary!r} of cosine similarity maps; allowed: {', '.join(SUMMARIES)}")
    return SUMMARIES[summary](_maps(evidence, sign, rescale, classes))


LOF_ROWS = 10_000
"""Samples that the local outlier factor compares with: a uniform sample of those it was fitted on."""


@register_fitted("gradient", PAPER)
class gga_detector:
    """An anomaly detector on the cosines of the cosine similarity map, fitted on in-distribution data.

    ``method``: ``lof``, the local outlier factor with ``neighbours``; or ``mahalanobis``, the squared distance to the
    mean under a Ledoit-Wolf covariance, fitted in constant memory. AUROC x 100 for errors, near and far data of a
    CIFAR-10 ResNet-20, fitted on 600 training images, was 81, 68 and 75 of ``lof``, 69, 62 and 79 of ``mahalanobis``,
    and 93, 75 and 80 of ``max_softmax``. The other arguments are those of ``gga``.
    """

    @staticmethod
    def measure(
        evidence: Evidence,
        *,
        method: str = "lof",
        neighbours: int = 20,
        classes: int | None = None,
        sign: bool = True,
        rescale: bool = True,
    ) -> Tensors:
        """The cosines above the diagonal."""
        if method not in ("lof", "mahalanobis"):
            raise ValueError(f"unknown method {method!r} of gga_detector; allowed: lof, mahalanobis")
        maps = _maps(evidence, sign, rescale, classes).to(evidence.logits.dtype)
        return {"cosines": cosine_map_summaries.csm_features(maps)}

    @staticmethod
    def accumulate(evidence: Evidence, measured: Tensors, *, method: str = "lof", **_: Any) -> Tensors:
        """Rows, or sums."""
        if method == "lof":
            return {"rows/cosines": measured["cosines"].float()}
        return moment_sums(measured["cosines"])

    @staticmethod
    def finish(total: Tensors, *, method: str = "lof", neighbours: int = 20, **_: Any) -> Tensors:
        """The detector."""
        if method == "lof":
            rows = total["rows/cosines"]
            return lof_state(rows[rows.isfinite().all(1)][:LOF_ROWS].double(), neighbours)
        return mahalanobis_state(total)

    @staticmethod
    def score(measured: Tensors, state: Tensors, *, method: str = "lof", neighbours: int = 20, **_: Any) -> Tensor:
        """The distance."""
        if method == "lof":
            return local_outlier_factor(measured["cosines"], state, neighbours)
        return mahalanobis(measured["cosines"], state)
