"""Repeats the forward pass of an observed batch, on the whole batch or on some of its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import (
    call,
    gradients_enabled,
    map_tensors,
    preserved,
    with_two_classes,
)
from lightning_gradmetrics.classifier.head import returning_logits
from lightning_gradmetrics.classifier.observation import redirected
from lightning_gradmetrics.classifier.sample_axis import tensors_with_samples
from lightning_gradmetrics.engine.api import eager
from lightning_gradmetrics.engine.inputs.shared_inputs import sample_flags
from lightning_gradmetrics.scoring.agreement import LOGITS_OF_PARTS, OTHER_LOGITS, are_close, check_same_logits
from lightning_gradmetrics.scoring.batch import ObservedBatch
from lightning_gradmetrics.scoring.evidence_checks import (
    NO_SAMPLE_AXIS,
    is_row_wise,
)

__all__ = ["RepeatedCall"]


@dataclass(frozen=True)
class RepeatedCall:
    """Repeats the call of a model that a step has made, and compares the logits.

    Args:
        model: The model.
        batch: The observed batch.
        head: The name of the classification head, or ``None`` to find it.
        logits_fn: Returns the logits ``(N, C)`` from the model's output.
    """

    model: nn.Module
    batch: ObservedBatch
    head: str | None
    logits_fn: Callable[[Any], Tensor]

    def first_input(self) -> Tensor:
        """Return the first tensor with samples among the inputs.

        Raises:
            ValueError: If the inputs are unknown or have no sample axis.
        """
        kind, batch = type(self.model).__name__, self.batch
        if batch.inputs is None:
            raise ValueError(
                f"the step does not call {kind} with known inputs, which scores over more than the head need. "
                "Pass submodule=, the part of the model that the step calls"
            )
        first = next(iter(tensors_with_samples(self.model, batch.inputs, batch.sample_axis)), None)
        if first is None or not is_row_wise(first, batch.size):
            raise ValueError(f"the inputs of {kind} {NO_SAMPLE_AXIS}")
        return first

    def logits(
        self, samples: Sequence[int] | None = None, flags: Sequence[bool] = (), with_graph: bool = False
    ) -> Tensor:
        """Return the logits of some samples of the batch, or of all, by a forward pass on them alone.

        Args:
            samples: The numbers of the samples; ``None`` for all.
            flags: For each tensor of the inputs, whether it has one row per sample.
            with_graph: Whether the logits have a graph.
        """
        model, batch, has_samples = self.model, self.batch, iter(flags)

        def picked(tensor: Tensor) -> Tensor:
            return tensor[list(samples)] if samples is not None and next(has_samples) else tensor.clone()

        with preserved(model), torch.set_grad_enabled(with_graph), eager(), self.returning_logits():
            logits: Tensor = call(model, map_tensors(batch.inputs, picked))
        return with_two_classes(logits) if batch.one_logit else logits

    @contextmanager
    def returning_logits(self) -> Iterator[None]:
        """Make calls of the model inside the block repeat the observed call and return its logits."""
        with (
            redirected(self.model, self.batch.called or self.model),
            returning_logits(self.model, self.head, self.logits_fn),
        ):
            yield

    def flags(self) -> tuple[bool, ...]:
        """Return for each tensor of the inputs whether it has one row per sample. The model runs on parts of the batch only.

        Raises:
            SampleAxisError: If that is ambiguous.
        """
        batch = self.batch

        def forward(samples: Sequence[int] | None, flags: Sequence[bool]) -> Tensor:
            return batch.logits if samples is None else self.logits(samples, flags)

        return sample_flags(self.model, batch.inputs, batch.size, forward, batch.sample_axis)  # type: ignore[arg-type]

    def check(self) -> None:
        """Refuse a model whose second forward pass on the batch returns different logits.

        Raises:
            ValueError: If it is one.
        """
        problem = LOGITS_OF_PARTS if self.batch.called is None else OTHER_LOGITS
        check_same_logits(self.logits(), self.batch.logits, f"{type(self.model).__name__} {problem}")

    def is_random(self) -> bool:
        """Return whether the model draws random numbers, so that logits of a batch and of part of it differ."""
        with preserved(self.model):
            torch.rand((), device=self.batch.logits.device)
            logits = self.logits()
        return not are_close(logits, self.batch.logits)

    def has_graph(self) -> bool:
        """Return whether the logits of the first sample depend on the parameters."""
        frozen = [parameter for parameter in self.model.parameters() if not parameter.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(parameter.is_floating_point())
            with gradients_enabled():
                return self.logits([0], self.flags(), with_graph=True).requires_grad
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
