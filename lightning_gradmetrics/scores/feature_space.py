"""Scores in the space of the head's input: Mahalanobis, relative Mahalanobis, nearest neighbours, ViM and SIRC."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_gradmetrics.scores.detectors import nearest_rows
from lightning_gradmetrics.scores.logits import entropy, max_softmax
from lightning_gradmetrics.scoring.arguments import Count
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.fitted import FittedScore
from lightning_gradmetrics.scoring.registry import register
from lightning_gradmetrics.scoring.totals import Tensors

__all__ = ["knn", "mahalanobis", "rmds", "sirc", "vim"]

RIDGE = 1e-6
"""This multiple of its mean eigenvalue is added to a covariance, so that it can be inverted."""

CONSTANT = 1e-12
"""A second moment below this fraction of the total counts as rounding error."""


def _unit(features: Tensor) -> Tensor:
    """Return each row divided by its L2 norm."""
    norms: Tensor = torch.linalg.vector_norm(features, 2, 1, keepdim=True)
    return features / norms.clamp(min=1e-12)


def _class_sums(features: Tensor, labels: Tensor, classes: int) -> Tensors:
    """Return counts, sums and second moments of the labelled rows, which may be added over batches."""
    if bool((labels >= classes).any()):
        raise ValueError(
            f"the data to fit on have the label {int(labels.max())}, and the model has {classes} classes: allowed are 0 to "
            f"{classes - 1}, and negative numbers for samples without a label"
        )
    known = labels >= 0
    rows = features[known]
    members = torch.nn.functional.one_hot(labels[known].long(), classes).to(rows)
    return {"counts": members.sum(0), "sums": members.T @ rows, "products": rows.T @ rows}


def _precision(scatter: Tensor, count: Tensor) -> Tensor:
    """Return the inverse of a covariance ``scatter / count`` with a small ridge."""
    covariance = scatter / count
    ridge = RIDGE * covariance.diagonal().mean().clamp(min=torch.finfo(covariance.dtype).tiny)
    inverse: Tensor = torch.linalg.inv(covariance + ridge * torch.eye(len(covariance)).to(covariance))
    return inverse


def _class_gaussians(total: Tensors, name: str) -> Tensors:
    """Return the means of the classes that have samples, and the precision of their common covariance."""
    counts, sums = total["counts"], total["sums"]
    present = counts > 0
    if not present.any():
        raise ValueError(f"the data to fit {name!r} on has no labelled sample: give batches (inputs, labels)")
    means = sums[present] / counts[present, None]
    scatter = total["products"] - (means * counts[present, None]).T @ means
    if not scatter.trace() > CONSTANT * total["products"].trace():
        raise ValueError(
            f"the features of the data to fit {name!r} on do not vary within the classes: give several samples of each class, "
            "whose features differ"
        )
    return {"means": means, "precision": _precision(scatter, counts.sum())}


def _distances(features: Tensor, means: Tensor, precision: Tensor) -> Tensor:
    """Return the squared Mahalanobis distances of rows to means, ``(N, K)``."""
    columns = []
    for mean in means:
        centred = features - mean
        columns.append((centred @ precision * centred).sum(1))
    return torch.stack(columns, 1)


@register("baseline", "Mueller & Hein 2025, arXiv:2505.18032; Lee et al. 2018, arXiv:1807.03888")
class mahalanobis(FittedScore):
    r"""Squared Mahalanobis distance of the head's input to the nearest class mean, on L2-normalised features.

    ``min_c (x - m_c)^T S^-1 (x - m_c)`` with ``x = h / |h|_2``, the class means ``m_c`` and one within-class covariance
    ``S``, of labelled in-distribution data. The fit is streaming and needs memory for D x D numbers.

    Args:
        normalise: Whether to divide the features by their L2 norm, as Mueller and Hein do ("Mahalanobis++"). ``False`` is
            the distance of Lee et al.

    Example:
        >>> import lightning_gradmetrics as lgm
        >>> model, images, labels = torch.nn.Linear(4, 3), torch.randn(30, 4), torch.arange(30) % 3
        >>> (fitted,) = lgm.fit(model, [(images, labels)], mahalanobis())
        >>> bool((lgm.score(model, images, fitted)["mahalanobis"] >= 0).all())
        True

    Reference:
        M. Mueller and M. Hein, "Mahalanobis++: Improving OOD Detection via Feature Normalization", ICML 2025,
        https://arxiv.org/abs/2505.18032; K. Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution
        Samples and Adversarial Attacks", NeurIPS 2018, https://arxiv.org/abs/1807.03888
    """

    normalise: bool = True

    def measure(self, evidence: Evidence) -> Tensors:
        return {"features": _unit(evidence.features) if self.normalise else evidence.features}

    def accumulate(self, evidence: Evidence, measured: Tensors) -> Tensors:
        return _class_sums(measured["features"], evidence.labels, evidence.logits.shape[1])

    def finish(self, total: Tensors) -> Tensors:
        return _class_gaussians(total, "mahalanobis")

    def score(self, measured: Tensors, state: Tensors) -> Tensor:
        return _distances(measured["features"], state["means"], state["precision"]).amin(1)


@register("baseline", "Ren et al. 2021, arXiv:2106.09022")
class rmds(FittedScore):
    r"""Relative Mahalanobis distance: that to the nearest class, minus that to all in-distribution data.

    ``min_c MD_c(h) - MD_0(h)``, where ``MD_c`` is the squared Mahalanobis distance to the mean of class ``c`` under the
    within-class covariance, and ``MD_0`` the distance to the overall mean under the overall covariance, of labelled
    in-distribution data. The fit is streaming and needs memory for D x D numbers.

    Example:
        >>> import lightning_gradmetrics as lgm
        >>> model, images, labels = torch.nn.Linear(4, 3), torch.randn(30, 4), torch.arange(30) % 3
        >>> (fitted,) = lgm.fit(model, [(images, labels)], rmds())
        >>> lgm.score(model, images, fitted)["rmds"].shape
        torch.Size([30])

    Reference:
        J. Ren et al., "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection", 2021,
        https://arxiv.org/abs/2106.09022
    """

    def measure(self, evidence: Evidence) -> Tensors:
        return {"features": evidence.features}

    def accumulate(self, evidence: Evidence, measured: Tensors) -> Tensors:
        return _class_sums(measured["features"], evidence.labels, evidence.logits.shape[1])

    def finish(self, total: Tensors) -> Tensors:
        count = total["counts"].sum()
        state = _class_gaussians(total, "rmds")
        mean = total["sums"].sum(0, keepdim=True) / count
        scatter = total["products"] - count * mean.T @ mean
        return {**state, "mean": mean, "overall_precision": _precision(scatter, count)}

    def score(self, measured: Tensors, state: Tensors) -> Tensor:
        nearest_class = _distances(measured["features"], state["means"], state["precision"]).amin(1)
        overall = _distances(measured["features"], state["mean"], state["overall_precision"])[:, 0]
        return nearest_class - overall


@register("baseline", "Sun et al. 2022, arXiv:2204.06507")
class knn(FittedScore):
    r"""Distance of the head's input to its k-th nearest neighbour among in-distribution samples.

    ``|x - x_(k)|_2`` with ``x = h / |h|_2``. The state consists of features: a uniform sample of at most 50,000 rows
    and 34 million numbers. Labels are not needed.

    Args:
        k: The rank of the neighbour. The paper uses 50 for CIFAR-10 and 1000 for ImageNet. If k exceeds the number of
            samples of a class, the score ranks in reverse.
        normalise: Whether to divide the features by their L2 norm, as the paper does.

    Example:
        >>> import lightning_gradmetrics as lgm
        >>> model, images = torch.nn.Linear(4, 3), torch.randn(30, 4)
        >>> (fitted,) = lgm.fit(model, [images], knn(k=1))
        >>> bool((lgm.score(model, images, fitted)["knn(k=1)"] < 1e-6).all())
        True

    Reference:
        Y. Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022,
        https://arxiv.org/abs/2204.06507
    """

    k: Count = 5
    normalise: bool = True

    def measure(self, evidence: Evidence) -> Tensors:
        return {"features": _unit(evidence.features) if self.normalise else evidence.features}

    def accumulate(self, evidence: Evidence, measured: Tensors) -> Tensors:
        return {"rows/features": measured["features"]}

    def finish(self, total: Tensors) -> Tensors:
        rows = total["rows/features"]
        rows = rows[rows.isfinite().all(1)]
        if len(rows) < self.k:
            raise ValueError(
                f"knn(k={self.k}) is fitted on {self.k} or more samples, but there are {len(rows)}: lower k"
            )
        return {"rows": rows}

    def score(self, measured: Tensors, state: Tensors) -> Tensor:
        features = measured["features"]
        broken = features.isfinite().all(1).logical_not()
        distances, _ = nearest_rows(features.masked_fill(broken[:, None], 0), state["rows"], self.k)
        return distances[:, -1].masked_fill(broken, torch.nan)


def _residual(features: Tensor, state: Tensors) -> Tensor:
    """Return the norm of the features' component outside the principal subspace, ``(N,)``."""
    norm: Tensor = torch.linalg.vector_norm((features - state["origin"]) @ state["null_space"], 2, 1)
    return norm


def _null_space(rows: Tensor, weight: Tensor, bias: Tensor, dimensions: int | None) -> Tensors:
    """Return the origin ``-W^+ b`` ``(D,)``, and the directions ``(D, D - d)`` of the least second moment about it."""
    origin = -torch.linalg.pinv(weight.double()) @ bias.double()
    size = rows.shape[1]
    principal = size // 2 if dimensions is None else dimensions
    if size < 2:
        raise ValueError(
            "the head's input has 1 number, and the principal subspace needs at least 2: choose a score that needs no such "
            "subspace, such as knn or mahalanobis"
        )
    if not 0 < principal < size:
        raise ValueError(f"dimensions={principal}; the head's input has {size} numbers: allowed are 1 to {size - 1}")
    centred = rows.double() - origin
    moments, directions = torch.linalg.eigh(centred.T @ centred)
    if not moments[: size - principal].sum() > CONSTANT * moments.sum():
        raise ValueError(
            f"all {len(rows)} samples to fit on are inside the principal subspace of {principal} dimensions: give more than {principal} "
            "samples, or lower dimensions="
        )
    return {"origin": origin, "null_space": directions[:, : size - principal].contiguous()}


def _rows_and_head(evidence: Evidence, features: Tensor) -> Tensors:
    weight, bias = evidence.head
    return {"rows/features": features, "model/weight": weight, "model/bias": bias}


@register("baseline", "Wang et al. 2022, arXiv:2203.10807")
class vim(FittedScore):
    r"""ViM: the norm of the features outside the principal subspace, as a virtual logit, plus the free energy.

    ``alpha |R^T (h - o)|_2 - log sum_c exp(z_c)`` with the origin ``o = -W^+ b`` of the head's weight and bias, ``R`` the
    directions outside the principal subspace of in-distribution features about ``o``, and ``alpha`` the ratio of the
    mean largest logit to the mean norm. The state consists of these three; the fit uses a uniform sample of at most
    50,000 samples. Labels are not needed.

    Args:
        dimensions: The dimensions of the principal subspace; ``None`` is half of the head's input. The paper uses 512
            of 768, or 1000 of 2048.

    Example:
        >>> import lightning_gradmetrics as lgm
        >>> model, images = torch.nn.Linear(4, 3), torch.randn(30, 4)
        >>> (fitted,) = lgm.fit(model, [images], vim())
        >>> lgm.score(model, images, fitted)["vim"].shape
        torch.Size([30])

    Reference:
        H. Wang et al., "ViM: Out-Of-Distribution with Virtual-logit Matching", CVPR 2022,
        https://arxiv.org/abs/2203.10807
    """

    dimensions: Count | None = None

    def measure(self, evidence: Evidence) -> Tensors:
        return {"features": evidence.features, "logits": evidence.logits}

    def accumulate(self, evidence: Evidence, measured: Tensors) -> Tensors:
        return {**_rows_and_head(evidence, measured["features"]), "rows/max_logit": measured["logits"].amax(1)}

    def finish(self, total: Tensors) -> Tensors:
        rows = total["rows/features"]
        state = _null_space(rows, total["model/weight"], total["model/bias"], self.dimensions)
        mean_residual = _residual(rows.double(), state).mean().clamp(min=torch.finfo(torch.float64).tiny)
        return {**state, "alpha": total["rows/max_logit"].double().mean() / mean_residual}

    def score(self, measured: Tensors, state: Tensors) -> Tensor:
        virtual = state["alpha"] * _residual(measured["features"], state)
        return virtual - measured["logits"].logsumexp(1)


PRIMARY = {"max_softmax": max_softmax(), "entropy": entropy()}


@register("baseline", "Xia & Bouganis 2022, arXiv:2207.07517")
class sirc(FittedScore):
    r"""SIRC: an error score that increases if a second score marks the sample as out-of-distribution.

    ``log S + log(1 + exp(-b (s - a)))`` with the error score ``S`` (``1 - p_y`` or the entropy) and a secondary
    confidence ``s``; ``a = mean(s) - 3 sd(s)`` and ``b = 1 / sd(s)`` over in-distribution data. For ordinary samples
    the second term is nearly constant, so the ranking of errors is preserved. As in the authors' code, the score is the
    logarithm of the paper's quantity. Labels are not needed.

    Args:
        primary: The error score: ``"max_softmax"`` or ``"entropy"``.
        secondary: The confidence: ``"feature_norm"``, the L1 norm of the head's input, or ``"residual"``, the negative
            norm of its component outside the principal subspace, as in ``vim``.
        dimensions: The dimensions of the principal subspace; ``None`` is half of the head's input.

    Example:
        >>> import lightning_gradmetrics as lgm
        >>> model, images = torch.nn.Linear(4, 3), torch.randn(30, 4)
        >>> (fitted,) = lgm.fit(model, [images], sirc(secondary="residual"))
        >>> lgm.score(model, images, fitted)["sirc(secondary=residual)"].shape
        torch.Size([30])

    Reference:
        G. Xia and C. Bouganis, "Augmenting Softmax Information for Selective Classification with Out-of-Distribution
        Data", ACCV 2022, https://arxiv.org/abs/2207.07517
    """

    primary: Literal["max_softmax", "entropy"] = "max_softmax"
    secondary: Literal["feature_norm", "residual"] = "feature_norm"
    dimensions: Count | None = None

    def measure(self, evidence: Evidence) -> Tensors:
        return {"primary": PRIMARY[self.primary](evidence), "features": evidence.features}

    def accumulate(self, evidence: Evidence, measured: Tensors) -> Tensors:
        return _rows_and_head(evidence, measured["features"])

    def finish(self, total: Tensors) -> Tensors:
        rows = total["rows/features"].double()
        state: Tensors = {}
        if self.secondary == "residual":
            state = _null_space(rows, total["model/weight"], total["model/bias"], self.dimensions)
        confidence = self._confidence(rows, state)
        spread = confidence.std(correction=0)
        if not spread > 0:
            raise ValueError(f"sirc: the {self.secondary} of all {len(rows)} samples to fit on is the same")
        return {**state, "a": confidence.mean() - 3 * spread, "b": 1 / spread}

    def score(self, measured: Tensors, state: Tensors) -> Tensor:
        error = measured["primary"].clamp(min=torch.finfo(measured["primary"].dtype).tiny)
        distance = state["b"] * (state["a"] - self._confidence(measured["features"], state))
        return error.log() + torch.nn.functional.softplus(distance)

    def _confidence(self, features: Tensor, state: Tensors) -> Tensor:
        if self.secondary == "residual":
            return -_residual(features, state)
        norm: Tensor = torch.linalg.vector_norm(features, 1, 1)
        return norm
