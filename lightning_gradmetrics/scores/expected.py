"""Scores that average over the classes that a sample could have: ExGrad, and the trace of the Fisher information."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.objectives import Objective
from lightning_gradmetrics.scoring.arguments import Count, Norm
from lightning_gradmetrics.scoring.evidence import Evidence, Gradient, Target
from lightning_gradmetrics.scoring.registry import register

__all__ = ["class_objectives", "class_order", "exgrad", "fisher_trace", "residual_norms", "sums_of_others"]


@register("gradient", "Igoe et al. 2022, arXiv:2205.10439")
def exgrad(evidence: Evidence, *, p: Norm = 1.0, target: Target = "head", classes: Count | None = None) -> Tensor:
    r"""Expected norm of the gradient under the predicted distribution, ``sum_c p_c |grad -log p_c|``.

    On the head's weight it is ``|h|_p sum_c p_c |softmax(z) - e_c|_p``, which for ``p = 1`` is
    ``2 |h|_1 (1 - sum_c p_c^2)``. Other targets take one backward pass per class.

    Args:
        p: The p of the norm.
        target: The parameters: ``"head"``, ``"all"``, a pattern such as ``"layer4.*"``, or a predicate on the name.
        classes: Only each sample's k likeliest classes, in k backward passes: the expectation given that the class is
            one of them, ``sum_{c in top k} p_c |grad -log p_c| / sum_{c in top k} p_c``. Without the division the
            top-k probability would cap the score, and the most spread-out predictions would look the most certain.
            ``classes=1`` is ``pseudo_label``; ``None`` takes all classes.

    Returns:
        A score with values ``(N,)``, at least 0.

    Example:
        >>> evidence = Evidence(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), given_features=torch.ones(2, 3))
        >>> exgrad()(evidence)
        tensor([1.2599, 3.0000], dtype=torch.float64)

    Reference:
        C. Igoe, Y. Chung, I. Char and J. Schneider, "How Useful are Gradients for OOD Detection Really?", 2022,
        https://arxiv.org/abs/2205.10439
    """
    if target == "head":
        probabilities = torch.softmax(evidence.logits, 1)
        size: Tensor = torch.linalg.vector_norm(evidence.features, p, 1)
        return size * _mean_over_classes(evidence, residual_norms(probabilities, p), classes)
    return _expected(evidence, target, classes, lambda gradient: gradient.norm(p))


@register("gradient", "cf. Igoe et al. 2022, arXiv:2205.10439")
def fisher_trace(evidence: Evidence, *, target: Target = "head", classes: Count | None = None) -> Tensor:
    r"""Trace of the Fisher information, ``sum_c p_c |grad -log p_c|_2^2``.

    On the head's weight it is ``|h|_2^2 (1 - sum_c p_c^2)``. Other targets take one backward pass per class.

    Args:
        target: The parameters: ``"head"``, ``"all"``, a pattern such as ``"layer4.*"``, or a predicate on the name.
        classes: Only each sample's k likeliest classes, in k backward passes, as in ``exgrad``:
            ``sum_{c in top k} p_c |grad -log p_c|_2^2 / sum_{c in top k} p_c``.

    Returns:
        A score with values ``(N,)``, at least 0.

    Example:
        >>> evidence = Evidence(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), given_features=torch.ones(2, 3))
        >>> fisher_trace()(evidence)
        tensor([0.6300, 1.5000], dtype=torch.float64)

    Reference:
        Compare C. Igoe, Y. Chung, I. Char and J. Schneider, "How Useful are Gradients for OOD Detection Really?", 2022,
        https://arxiv.org/abs/2205.10439
    """
    if target == "head":
        squares = residual_norms(torch.softmax(evidence.logits, 1), 2).square()
        return evidence.features.square().sum(1) * _mean_over_classes(evidence, squares, classes)
    return _expected(evidence, target, classes, lambda gradient: gradient.norm(2).square())


def class_order(logits: Tensor, classes: int | None) -> Tensor:
    """Return each sample's likeliest classes, ``(N, K)``, likeliest first; K is at most ``classes``."""
    return logits.argsort(dim=1, descending=True, stable=True)[:, :classes]


def class_objectives(count: int, classes: int | None) -> list[Objective]:
    """Return the objectives of all ``count`` classes in the model's order, or of the ``classes`` likeliest by rank."""
    if classes is None or classes >= count:
        return [Objective.of("class", index=c) for c in range(count)]
    return [Objective.of("ranked_class", rank=r) for r in range(classes)]


def _expected(evidence: Evidence, target: Target, classes: int | None, value: Callable[[Gradient], Tensor]) -> Tensor:
    """Return the mean over classes of a function of their gradients, one backward pass per class."""
    probabilities = torch.softmax(evidence.logits, 1)
    order = class_order(evidence.logits, classes)
    if order.shape[1] < probabilities.shape[1]:
        probabilities = probabilities.gather(1, order)
    objectives = class_objectives(evidence.logits.shape[1], classes)
    values = torch.stack([value(evidence.gradient(objective, target)) for objective in objectives], 1)
    return _weighted_mean(probabilities.to(values.dtype), values)


def _mean_over_classes(evidence: Evidence, values: Tensor, classes: int | None) -> Tensor:
    """Return the mean of ``(N, C)`` values over the likeliest classes, weighted by their probabilities."""
    order = class_order(evidence.logits, classes)
    return _weighted_mean(torch.softmax(evidence.logits, 1).gather(1, order), values.gather(1, order))


def _weighted_mean(weights: Tensor, values: Tensor) -> Tensor:
    return (weights * values).sum(1) / weights.sum(1)


def residual_norms(probabilities: Tensor, p: float) -> Tensor:
    """``|p - e_c|_p`` of each class ``c`` for probabilities ``(N, C)``, without a ``(N, C, C)`` tensor: ``(N, C)``."""
    others = sums_of_others(probabilities)  # 1 - p
    if p == float("inf"):
        return torch.maximum(others, _largest_other(probabilities))
    return (sums_of_others(probabilities.pow(p)) + others.pow(p)).pow(1 / p)


def sums_of_others(rows: Tensor) -> Tensor:
    """Return, for each entry of non-negative rows ``(N, C)``, the sum of the others, ``(N, C)``.

    That of the largest entry is added up, since the difference from the total has no digits where the others are small.
    """
    top = rows.argmax(1, keepdim=True)
    differences = (rows.sum(1, keepdim=True) - rows).clamp(min=0)
    return differences.scatter(1, top, rows.scatter(1, top, 0.0).sum(1, keepdim=True))


def _largest_other(probabilities: Tensor) -> Tensor:
    """For each class, the largest probability of another one, ``(N, C)``."""
    first, second = probabilities.topk(2, 1).values.chunk(2, 1)
    return torch.where(probabilities == first, second, first)
