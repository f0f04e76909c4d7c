"""Compares gradients with those of in-distribution data: GROOD, and the cosine to the mean gradient of the class."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.objectives import class_residual
from lightning_gradmetrics.scores.detectors import nearest_rows
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.fitted import FittedScore
from lightning_gradmetrics.scoring.registry import register
from lightning_gradmetrics.scoring.totals import Tensors

__all__ = ["gradient_cosine", "grood"]

MOST_ENTRIES = 2**27
"""Largest number of entries in the mean gradients of all classes."""


def _noise_gradients(features: Tensor, prototypes: Tensor, noise: Tensor) -> Tensor:
    """Return GROOD's gradients ``(N, D)``: ``p_o (h - m_o) / |h - m_o|`` with ``p`` the softmax of negative distances."""
    to_classes = torch.cdist(features, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
    away = features - noise
    to_noise: Tensor = torch.linalg.vector_norm(away, 2, 1, keepdim=True)
    probability = torch.softmax(-torch.cat([to_classes, to_noise], 1), 1)[:, -1:]
    return probability * away / to_noise.clamp(min=torch.finfo(away.dtype).tiny)


@register("gradient", "ElAraby et al. 2023, arXiv:2312.14427")
class grood(FittedScore):
    r"""GROOD: distance of the gradient for an out-of-distribution prototype to the nearest one of in-distribution data.

    The prototypes ``m_c`` are the class means of the head's input ``h``, and ``m_o``, the out-of-distribution prototype,
    is their mean. The gradient of the cross-entropy of the softmax of ``-|h - m|_2`` with respect to ``m_o`` has the closed
    form ``p_o (h - m_o) / |h - m_o|_2``. The score is its distance to the nearest gradient of a correctly predicted sample of
    labelled in-distribution data; the state has one row per sample, at most 50,000.

    The authors' other out-of-distribution prototypes, of noise, of mixed features or of out-of-distribution data, are not
    included. The public OpenOOD code takes the softmax in its option ``use_direct_grad`` over an axis of length one, so
    that ``p_o`` is 1 there; this score is the gradient that its autograd path computes.

    Example:
        >>> import lightning_gradmetrics as lgm
        >>> model, images = torch.nn.Linear(4, 3), torch.randn(30, 4)
        >>> (fitted,) = lgm.fit(model, [(images, model(images).argmax(1))], grood())
        >>> bool((lgm.score(model, images, fitted)["grood"] < 1e-6).all())
        True

    Reference:
        M. ElAraby et al., "GROOD: Gradient-Aware Out-of-Distribution Detection", 2023, https://arxiv.org/abs/2312.14427
    """

    def measure(self, evidence: Evidence) -> Tensors:
        return {"features": evidence.features}

    def accumulate(self, evidence: Evidence, measured: Tensors) -> Tensors:
        known = evidence.labels.masked_fill(evidence.labels >= evidence.logits.shape[1], -1)
        return {
            "rows/features": measured["features"],
            "rows/label": known,
            "rows/incorrect": evidence.incorrect,
        }

    def finish(self, total: Tensors) -> Tensors:
        features, labels = total["rows/features"], total["rows/label"]
        usable = (labels >= 0) & features.isfinite().all(1)
        correct = usable & ~total["rows/incorrect"]
        if not correct.any():
            raise ValueError("grood is fitted on correctly predicted samples with labels, but there are none")
        means = []
        for label in torch.unique(labels[usable]):
            means.append(features[usable & (labels == label)].mean(0))
        prototypes = torch.stack(means)
        noise = prototypes.mean(0)
        return {
            "prototypes": prototypes,
            "noise": noise,
            "rows": _noise_gradients(features[correct], prototypes, noise),
        }

    def score(self, measured: Tensors, state: Tensors) -> Tensor:
        gradients = _noise_gradients(measured["features"], state["prototypes"], state["noise"])
        broken = gradients.isfinite().all(1).logical_not()
        distances, _ = nearest_rows(gradients.masked_fill(broken[:, None], 0), state["rows"], 1)
        return distances[:, 0].masked_fill(broken, torch.nan)


def _unit(rows: Tensor) -> Tensor:
    """Return each row divided by its L2 norm; rows whose squares would underflow are scaled first."""
    rows = rows / rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    norms: Tensor = torch.linalg.vector_norm(rows, 2, 1, keepdim=True)
    return rows / norms.clamp(min=torch.finfo(rows.dtype).tiny)


@register("gradient", "after Xie et al. 2024, arXiv:2402.13494")
class gradient_cosine(FittedScore):
    r"""Negative cosine of a sample's gradient to the mean gradient of its predicted class.

    The gradient is that of the cross-entropy to the predicted class with respect to the head's weight, ``G = g h^T``. With
    ``R_y`` the mean gradient of the in-distribution samples that are predicted as ``y``, the cosine is the contraction
    ``g^T R_y h / (|g| |h| |R_y|)``: no sample's gradient tensor is computed. The fit is streaming and needs memory for
    C x C x D numbers. Labels are not needed.

    GradSafe compares the gradients of prompts with a mean gradient by cosines of slices of parameters. Using one cosine
    of the head's whole gradient, and one reference per class, is this package's choice.

    Raises:
        ValueError: If C x C x D exceeds 134 million.

    Example:
        >>> import lightning_gradmetrics as lgm
        >>> model, images = torch.nn.Linear(4, 3), torch.randn(30, 4)
        >>> (fitted,) = lgm.fit(model, [images], gradient_cosine())
        >>> bool((lgm.score(model, images, fitted)["gradient_cosine"].abs() <= 1).all())
        True

    Reference:
        Y. Xie et al., "GradSafe: Detecting Jailbreak Prompts for LLMs via Safety-Critical Gradient Analysis", ACL 2024,
        https://arxiv.org/abs/2402.13494
    """

    def measure(self, evidence: Evidence) -> Tensors:
        predicted = evidence.logits.argmax(1)
        return {
            "output": class_residual(evidence.logits, predicted),
            "features": evidence.features,
            "predicted": predicted,
        }

    def accumulate(self, evidence: Evidence, measured: Tensors) -> Tensors:
        output, features = measured["output"], measured["features"]
        classes, size = output.shape[1], features.shape[1]
        if classes**2 * size > MOST_ENTRIES:
            raise ValueError(
                f"gradient_cosine stores {classes} mean gradients of {classes} x {size} numbers, more than {MOST_ENTRIES}: "
                "use gradnorm or grood for models with many classes"
            )
        members = torch.nn.functional.one_hot(measured["predicted"], classes).to(output)
        return {"gradients": torch.einsum("nk,nc,nd->kcd", members, output, features)}

    def finish(self, total: Tensors) -> Tensors:
        sums = total["gradients"].double()
        return {"references": _unit(sums.flatten(1)).view_as(sums)}

    def score(self, measured: Tensors, state: Tensors) -> Tensor:
        output, features = _unit(measured["output"]), _unit(measured["features"])
        references, cosines = state["references"].to(output.dtype), []
        for g, h, label in zip(output, features, measured["predicted"].tolist(), strict=True):
            cosines.append(g @ references[label] @ h)
        return -torch.stack(cosines)
