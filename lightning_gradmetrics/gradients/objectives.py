"""Objectives: the per-sample losses that are differentiated.

An objective maps logits ``(N, C)`` to one loss per sample, ``(N,)``. It never averages over the batch, because a mean
would multiply every gradient by a hidden ``1/N``.

No objective computes ``1 - p``. The difference loses all precision if the softmax rounds to 1, which in float32 begins
at a logit gap of 15. The cross-entropy to a class ``c`` is computed as ``softplus(logsumexp of the other logits -
z_c)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_gradmetrics.classifier.hints import did_you_mean
from lightning_gradmetrics.gradients.precision import accumulator, at_least_float32

__all__ = [
    "OBJECTIVES",
    "Loss",
    "Objective",
    "class_gradient",
    "class_loss",
    "class_residual",
    "confounding",
    "confounding_logits",
    "label",
    "log_probabilities",
    "pseudo_label",
    "ranked_class",
    "uniform",
]

Loss = Callable[[Tensor], Tensor]
"""A function from logits ``(N, C)`` to losses ``(N,)``."""

IGNORED = -100
"""The label of samples without a loss, as in :func:`torch.nn.functional.cross_entropy`."""

LINEAR = 40.0
"""Above this, ``softplus(x)`` is ``x``: ``exp(-40)`` is below float64's precision, and ``exp(40)`` fits float32."""

OF_CLASSES = frozenset({"pseudo_label", "uniform", "confounding", "label", "class", "ranked_class"})
"""Objectives that use the softmax, which is constant for a single class."""


def pseudo_label(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy to the predicted class, ``-log softmax(z / T)_y`` with ``y = argmax z``; ``(N, C) -> (N,)``."""
    return class_loss(logits, logits.detach().argmax(1), temperature=temperature)


def uniform(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy to the uniform distribution, ``-mean_c log softmax(z / T)_c``; ``(N, C) -> (N,)``."""
    return -F.log_softmax(at_least_float32(logits) / temperature, 1).mean(1)


def confounding(logits: Tensor) -> Tensor:
    """Binary cross-entropy of the softmax to a label of ones, ``-sum_c log softmax(z)_c``; ``(N, C) -> (N,)``."""
    return -F.log_softmax(at_least_float32(logits), 1).sum(1)


def confounding_logits(logits: Tensor) -> Tensor:
    """Binary cross-entropy with logits to a label of ones, ``-sum_c log sigmoid(z_c)``; ``(N, C) -> (N,)``."""
    return F.softplus(-at_least_float32(logits), threshold=LINEAR).sum(1)


def label(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy to the true labels ``targets`` ``(N,)``; ``(N, C) -> (N,)``. The label -100 has loss zero.

    Raises:
        ValueError: If a label is not one of the ``C`` classes. (On a CUDA device, torch reports an assertion instead.)
    """
    known = targets != IGNORED
    with _labels_checked(targets, logits.shape[1]):
        losses = class_loss(logits, targets.where(known, 0))
    return losses.where(known, 0)


@contextmanager
def _labels_checked(targets: Tensor, classes: int) -> Iterator[None]:
    """Explain an error in the block if it is due to the labels ``(N,)``. Labels are not compared otherwise, to save time."""
    try:
        yield
    except RuntimeError as error:
        if not targets.is_cpu:  # after an assertion, a CUDA device cannot run anything
            raise
        labels = _without_vmap(targets)
        wrong = labels[((labels < 0) | (labels >= classes)) & (labels != IGNORED)]
        if not wrong.numel():
            raise
        raise ValueError(
            f"the labels contain {wrong[0].item()}, but the logits have {classes} classes; allowed: the class indices 0 to "
            f"{classes - 1}, and {IGNORED} for samples without a label"
        ) from error


def _without_vmap(tensor: Tensor) -> Tensor:
    """Return the tensor of all samples inside ``vmap``, where values cannot choose rows."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def class_loss(logits: Tensor, index: int | Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy to a class ``c``, the same for all samples or one per sample ``(N,)``; ``(N, C, *P) -> (N, *P)``.

    Computed as ``softplus(logsumexp_{j != c} z_j / T - z_c / T)``: value and gradient stay accurate at any logit gap.
    """
    scaled = at_least_float32(logits) / temperature
    classes = torch.as_tensor(index, device=logits.device).long().expand(logits[:, 0].shape)[:, None]
    others = scaled.scatter(1, classes, -torch.inf).logsumexp(1)
    return F.softplus(others - scaled.gather(1, classes)[:, 0], threshold=LINEAR)


def ranked_class(logits: Tensor, rank: int) -> Tensor:
    """Cross-entropy to each sample's class of rank ``rank`` by its logits, 0 the likeliest; ``(N, C) -> (N,)``."""
    order = logits.detach().argsort(dim=1, descending=True, stable=True)
    return class_loss(logits, order[:, rank])


def class_residual(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the gradient of the cross-entropy to a class per sample, ``softmax(z) - e_c``, without ``1 - p``.

    Args:
        logits: ``(N, C)``.
        classes: ``(N,)``, class indices.

    Returns:
        ``(N, C)``; each row sums to zero.

    Example:
        >>> class_residual(torch.tensor([[50.0, 0.0, 0.0]]), torch.tensor([0]))
        tensor([[-3.8575e-22,  1.9287e-22,  1.9287e-22]])
    """
    index = classes.long()[:, None]
    others = torch.softmax(at_least_float32(logits), 1).scatter(1, index, 0.0)
    return others.scatter(1, index, -others.sum(1, keepdim=True))


def class_gradient(logits: Tensor, index: int | Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the gradient ``(N, C)`` of :func:`class_loss` with respect to the logits, in closed form."""
    classes = torch.as_tensor(index, device=logits.device).long().expand(len(logits))
    residual = class_residual(logits / temperature if temperature != 1 else logits, classes)
    return residual / temperature if temperature != 1 else residual


def log_probabilities(logits: Tensor) -> Tensor:
    """Return ``log softmax(z)``, ``(N, C)``, accurate even for the likeliest class, whose logarithm is close to zero.

    Example:
        >>> log_probabilities(torch.tensor([[50.0, 0.0]]))
        tensor([[-1.9287e-22, -5.0000e+01]])
    """
    likeliest = logits.detach().argmax(1)
    losses = class_loss(logits, likeliest)
    return F.log_softmax(at_least_float32(logits), 1).scatter(1, likeliest[:, None], -losses[:, None])


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "pseudo_label": pseudo_label,
    "uniform": uniform,
    "confounding": confounding,
    "confounding_logits": confounding_logits,
    "label": label,
    "class": class_loss,
    "ranked_class": ranked_class,
}


@dataclass(frozen=True)
class Objective:
    """A named objective with its arguments. It is hashable, so that scores with the same objective share its backward pass.

    Args:
        name: A key of :data:`OBJECTIVES`, or any name if ``function`` is given.
        arguments: Keyword arguments, as a sorted tuple of pairs.
        function: A callable ``(N, C) -> (N,)``; ``None`` uses the built-in objective of that name.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> Objective.of("uniform", temperature=2.0).loss()(torch.zeros(3, 4))
        tensor([1.3863, 1.3863, 1.3863])
    """

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()
    function: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        if self.function is None and self.name not in OBJECTIVES:
            raise ValueError(
                f"unknown objective {self.name!r};{did_you_mean(self.name, OBJECTIVES)} available: {', '.join(OBJECTIVES)}, "
                "or any callable from logits (N, C) to losses (N,)"
            )

    @classmethod
    def of(cls, objective: str | Loss | Objective, **arguments: Any) -> Objective:
        """Make an objective from a name or a callable; an objective is returned unchanged."""
        if isinstance(objective, Objective):
            return objective
        pairs = tuple(sorted(arguments.items()))
        if callable(objective):
            return cls(getattr(objective, "__name__", type(objective).__name__), pairs, objective)
        return cls(objective, pairs)

    @property
    def needs_targets(self) -> bool:
        """Whether the objective needs true labels."""
        return self.function is None and self.name == "label"

    def loss(self, targets: Tensor | None = None) -> Loss:
        """Bind the arguments and the true labels: returns a callable from logits ``(N, C)`` to checked losses ``(N,)``."""
        function, arguments = self.function or OBJECTIVES[self.name], dict(self.arguments)
        if self.needs_targets:
            if targets is None:
                raise ValueError(
                    "the objective 'label' needs true labels: pass targets=, a tensor (N,) of class indices"
                )
            arguments["targets"] = targets

        def checked(logits: Tensor) -> Tensor:
            self.check_classes(logits)
            losses = function(logits, **arguments) if self.function is None else _precise(function, logits, arguments)
            if not isinstance(losses, Tensor) or losses.is_complex():
                kind = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
                raise TypeError(
                    f"objective {self.name!r} must return a tensor of real losses ({len(logits)},), got {kind}"
                )
            if losses.shape != logits.shape[:1]:
                raise ValueError(
                    f"objective {self.name!r} returned shape {tuple(losses.shape)} for logits of shape {tuple(logits.shape)}; "
                    f"it must return one loss per sample, ({len(logits)},): use reduction='none'"
                )
            return losses

        return checked

    def gradient(self, logits: Tensor, targets: Tensor | None = None) -> Tensor | None:
        """Return the gradient ``(N, C)`` with respect to the logits in closed form; ``None`` if there is none."""
        if self.function is not None or self.name not in ("pseudo_label", "label", "class"):
            return None
        self.check_classes(logits)
        arguments = dict(self.arguments)
        if self.name == "pseudo_label":
            return class_gradient(logits, logits.argmax(1), **arguments)
        if self.name == "class":
            return class_gradient(logits, **arguments)
        if targets is None:
            return None
        known = targets != IGNORED
        with _labels_checked(targets, logits.shape[1]):
            gradient = class_gradient(logits, targets.where(known, 0))
        return gradient.where(known[:, None], 0.0)

    def check_classes(self, logits: Tensor) -> None:
        """Refuse logits of one class for an objective of the softmax.

        Raises:
            ValueError: If the objective is constant for these logits.
        """
        if logits.shape[1] < 2 and self.function is None and self.name in OF_CLASSES:
            raise ValueError(
                f"objective {self.name!r} is constant for logits of shape {tuple(logits.shape)}: the softmax of one class "
                "is 1. Allowed: two or more classes. For one logit z pass logits=, a callable that returns (0, z)"
            )


def _precise(function: Callable[..., Tensor], logits: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Return a user's losses on float64 logits, or on narrower ones if the function contains tensors of that type."""
    try:
        return function(logits.to(accumulator(logits)), **arguments)
    except RuntimeError:
        for dtype in (logits.dtype, torch.float32, torch.bfloat16, torch.float16):
            with suppress(RuntimeError):
                return function(logits.to(dtype), **arguments)
        raise
