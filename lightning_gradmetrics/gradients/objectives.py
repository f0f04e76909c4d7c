"""Objectives: the per-sample losses whose gradients are measured.

An objective maps logits ``(N, C)`` to losses ``(N,)``, one a sample. It never averages over the batch: a mean would put a hidden
``1/N`` on every gradient.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "OBJECTIVES",
    "Loss",
    "Objective",
    "class_loss",
    "confounding",
    "confounding_logits",
    "label",
    "pseudo_label",
    "ranked_class",
    "uniform",
]

Loss = Callable[[Tensor], Tensor]
"""Logits ``(N, C)`` to losses ``(N,)``."""


def pseudo_label(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy to the predicted class, ``-log softmax(z / T)_y`` with ``y = argmax z``; ``(N, C) -> (N,)``."""
    return class_loss(logits, logits.detach().argmax(1), temperature=temperature)


def uniform(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy to the uniform distribution, ``-mean_c log softmax(z / T)_c``; ``(N, C) -> (N,)``."""
    return -F.log_softmax(logits / temperature, 1).mean(1)


def confounding(logits: Tensor) -> Tensor:
    """Binary cross-entropy of the softmax to a label of ones, ``-sum_c log softmax(z)_c``; ``(N, C) -> (N,)``.

    The logarithm of the softmax is taken in one step, so that nothing underflows at large logit gaps.
    """
    return -F.log_softmax(logits, 1).sum(1)


def confounding_logits(logits: Tensor) -> Tensor:
    """Binary cross-entropy with logits to a label of ones, ``-sum_c log sigmoid(z_c)``; ``(N, C) -> (N,)``."""
    return F.softplus(-logits).sum(1)


def label(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy to the true labels ``targets`` ``(N,)``; ``(N, C) -> (N,)``."""
    return F.cross_entropy(logits, targets, reduction="none")


def class_loss(logits: Tensor, index: int | Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy to a class: one for all samples, or one a sample ``(N,)``; ``(N, C) -> (N,)``."""
    classes = torch.as_tensor(index, device=logits.device).expand(len(logits))
    return -F.log_softmax(logits / temperature, 1).gather(1, classes[:, None])[:, 0]


def ranked_class(logits: Tensor, rank: int) -> Tensor:
    """Cross-entropy to each sample's class of rank ``rank`` by its logits, 0 the likeliest; ``(N, C) -> (N,)``."""
    order = logits.detach().argsort(dim=1, descending=True, stable=True)
    return class_loss(logits, order[:, rank])


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
    """A named objective with its arguments, hashable, so that two scores that ask for the same one share its backward pass.

    Args:
        name: A key of :data:`OBJECTIVES`, or any name for ``function``.
        arguments: Keyword arguments, as a sorted tuple of pairs.
        function: The callable ``(N, C) -> (N,)``; ``None`` takes the registered one.

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
            near = difflib.get_close_matches(self.name, OBJECTIVES, 1)
            hint = f" did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"unknown objective {self.name!r};{hint} available: {', '.join(OBJECTIVES)}, "
                "or any callable from logits (N, C) to losses (N,)"
            )

    @classmethod
    def of(cls, objective: str | Loss | Objective, **arguments: Any) -> Objective:
        """Make an objective of a name, of a callable, or of one already made."""
        if isinstance(objective, Objective):
            return objective
        pairs = tuple(sorted(arguments.items()))
        if callable(objective):
            return cls(getattr(objective, "__name__", type(objective).__name__), pairs, objective)
        return cls(objective, pairs)

    @property
    def needs_targets(self) -> bool:
        """Whether true labels are needed."""
        return self.function is None and self.name == "label"

    def loss(self, targets: Tensor | None = None) -> Loss:
        """Bind the arguments (and the true labels): a callable from logits ``(N, C)`` to checked losses ``(N,)``."""
        function, arguments = self.function or OBJECTIVES[self.name], dict(self.arguments)
        if self.needs_targets:
            if targets is None:
                raise ValueError(
                    "the objective 'label' needs true labels: pass targets=, a tensor (N,) of class indices"
                )
            arguments["targets"] = targets

        def checked(logits: Tensor) -> Tensor:
            losses = function(logits, **arguments)
            if losses.shape != logits.shape[:1]:
                raise ValueError(
                    f"objective {self.name!r} returned shape {tuple(losses.shape)} for logits of shape {tuple(logits.shape)}; "
                    f"it must return one loss a sample, ({len(logits)},): use reduction='none'"
                )
            return losses

        return checked
