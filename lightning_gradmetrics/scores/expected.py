"""Scores that average over the possible classes of a sample: ExGrad, and the trace of the Fisher information."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.objectives import Objective
from lightning_gradmetrics.gradients.softmax import Softmax
from lightning_gradmetrics.scoring.arguments import Count, Norm
from lightning_gradmetrics.scoring.evidence import Evidence, Gradient, Target
from lightning_gradmetrics.scoring.registry import register

__all__ = ["class_objectives", "class_order", "exgrad", "fisher_trace", "residual_norms"]

MOST_CLASSES = 1000
"""Largest number of classes, because the engine stores gradients of the logits of all classes, ``(N, C, C)``."""


@register("gradient", "Igoe et al. 2022, arXiv:2205.10439")
def exgrad(evidence: Evidence, *, p: Norm = 1.0, target: Target = "head", classes: Count | None = None) -> Tensor:
    r"""Expected norm of the gradient under the predicted distribution, ``sum_c p_c |grad -log p_c|``.

    On the head's weight it is ``|h|_p sum_c p_c |softmax(z) - e_c|_p``, which for ``p = 1`` is
    ``2 |h|_1 (1 - sum_c p_c^2)``. Other targets take one backward pass per class.

    Args:
        p: The p of the norm.
        target: The parameters: ``"head"``, ``"all"``, a pattern such as ``"layer4.*"``, or a predicate on the name.
        classes: Use only each sample's k likeliest classes, in k backward passes: the expectation given that the class
            is one of them, ``sum_{c in top k} p_c |grad -log p_c| / sum_{c in top k} p_c``. Without the division, the
            top-k probability would cap the score, and the most spread-out predictions would look the most certain.
            ``classes=1`` is ``pseudo_label``; ``None`` uses all classes.

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
    if target == "head" and evidence.has_product_gradient:
        if p == 1 and classes is None:
            return 2 * evidence.head_input.norm(1) * evidence.softmax().impurity
        return evidence.head_input.norm(p) * _mean_over_classes(
            evidence, residual_norms(evidence.softmax(), p), classes
        )
    return _expected(evidence, target, classes, lambda gradient: gradient.norm(p))


@register("gradient", "cf. Igoe et al. 2022, arXiv:2205.10439")
def fisher_trace(evidence: Evidence, *, target: Target = "head", classes: Count | None = None) -> Tensor:
    r"""Trace of the Fisher information, ``sum_c p_c |grad -log p_c|_2^2``.

    On the head's weight it is ``|h|_2^2 (1 - sum_c p_c^2)``. Other targets take one backward pass per class.

    Args:
        target: The parameters: ``"head"``, ``"all"``, a pattern such as ``"layer4.*"``, or a predicate on the name.
        classes: Use only each sample's k likeliest classes, in k backward passes, as in ``exgrad``:
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
    if target == "head" and evidence.has_product_gradient:
        if classes is None:
            return evidence.head_input.norm(2).square() * evidence.softmax().impurity
        squares = residual_norms(evidence.softmax(), 2).square()
        return evidence.head_input.norm(2).square() * _mean_over_classes(evidence, squares, classes)
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
    count = evidence.logits.shape[1] if classes is None else min(classes, evidence.logits.shape[1])
    if count > MOST_CLASSES:
        raise ValueError(
            f"{count} classes take as many backward passes, and memory for {count}^2 numbers per sample: pass "
            f"classes=, the number of each sample's likeliest classes (at most {MOST_CLASSES}), as in classes=10"
        )
    probabilities = evidence.softmax().probabilities
    if classes is not None and classes < probabilities.shape[1]:
        probabilities = probabilities.gather(1, class_order(evidence.logits, classes))
    objectives = class_objectives(evidence.logits.shape[1], classes)
    values = torch.stack([value(evidence.gradient(objective, target)) for objective in objectives], 1)
    return _weighted_mean(probabilities.to(values.dtype), values)


def _mean_over_classes(evidence: Evidence, values: Tensor, classes: int | None) -> Tensor:
    """Return the mean of ``(N, C, *P)`` values over the likeliest classes, weighted by their probabilities."""
    probabilities = evidence.softmax().probabilities
    if classes is None or classes >= values.shape[1]:
        return (probabilities * values).sum(1)
    order = class_order(evidence.logits, classes)
    return _weighted_mean(probabilities.gather(1, order), values.gather(1, order))


def _weighted_mean(weights: Tensor, values: Tensor) -> Tensor:
    return (weights * values).sum(1) / weights.sum(1)


def residual_norms(softmax: Softmax, p: float) -> Tensor:
    """Return ``|p - e_c|_p`` of each class ``c``, without a ``(N, C, C)`` tensor: ``(N, C, *P)``."""
    others = softmax.complements
    if p == float("inf"):
        second = softmax.second.unsqueeze(1)
        largest_other = torch.where(softmax.is_top, second, (1 - softmax.error).unsqueeze(1))
        return torch.maximum(others, largest_other)
    if p == 1:
        return 2 * others
    powers = softmax.probabilities.pow(p)
    return (_sums_of_others(powers, softmax) + others.pow(p)).pow(1 / p)


def _sums_of_others(powers: Tensor, softmax: Softmax) -> Tensor:
    """Return, for each class, the sum of the other classes' powers, computed without cancellation."""
    differences = (powers.sum(1, keepdim=True) - powers).clamp(min=0)
    rest = powers.masked_fill(softmax.is_top, 0).sum(1, keepdim=True)
    return torch.where(softmax.is_top, rest, differences)
