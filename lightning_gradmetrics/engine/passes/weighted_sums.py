"""Sums of gradients that cancel are compared with other weights.

Some layers have output gradients that add up to zero over the features of each sample: logits under cross-entropy, the layer before a
layer norm. The sum of the entries of the parameter's gradient is then zero, also if it is that of another row. So the rule of such a
call runs a second time with ``w g`` instead of the gradient ``g``, with fixed factors ``w``, and the sum is compared again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_gradmetrics.engine.passes.gather import MomentTable
from lightning_gradmetrics.engine.passes.plan import Source
from lightning_gradmetrics.engine.rules import Call, Rule
from lightning_gradmetrics.engine.rules.sums import sums_of
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.calls import Silence
from lightning_gradmetrics.engine.uses import Use, combined
from lightning_gradmetrics.gradients.precision import at_least_float32

__all__ = ["WeightedSums"]

CANCELLED = 2.0**-10
"""A sum is zero if it is smaller than this fraction of that of the absolute values, or in half precision than 16 times its precision."""

FEW = 4
"""Number of samples that show whether the sums of a call cancel; if all their gradients are zero, they do."""

GOLDEN = 0.6180339887498949


class WeightedSums:
    """The sums and the moments of each sample's gradient with ``w g`` instead of the output gradient ``g``, for calls that cancel.

    Args:
        task: The batch.

    Attributes:
        tables: The moments by the rules, for each objective; ``None`` if no call cancels.
        sums: For each objective the sums ``(N,)`` by parameter from the second formula.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._uses: dict[str, list[Use]] = {}
        self._scales: list[Tensor] = []
        self._weights = torch.empty(0)
        self.tables: list[MomentTable | None] = []
        self.sums: list[dict[str, Tensor]] = []

    def begin(self, undo: Tensor) -> None:
        """Begin an objective; multiplying by ``undo`` ``(N,)`` removes the scale of its gradients."""
        self.finish()
        self._scales.append(undo)
        self.sums.append({})

    def add(self, rule: Rule, call: Call, slots: Mapping[str, Source], g: Tensor, sums: Mapping[str, Tensor]) -> None:
        """Add a call, if its sums cancel.

        Args:
            rule: Its rule.
            call: The call.
            slots: The source of each of its arguments whose gradient is wanted.
            g: The gradient of its output, in the form that the rule takes.
            sums: The sums of the gradients ``(N,)`` by slot.
        """
        known = {slot for slot, source in slots.items() if slot in sums and isinstance(source, str)}
        cancelled = _cancelled(known, g, call.get("groups", 1) == 1) if known else known
        if not cancelled:
            return
        weighted, only = g * self._weights_like(g), replace(call, slots=frozenset(cancelled))
        for slot, total in sums_of(rule, only, weighted).items():
            if slot in cancelled:
                self._add_sum(str(slots[slot]), total)
        for slot, use in rule.uses(only, weighted):
            if slot in cancelled:
                self._uses.setdefault(str(slots[slot]), []).append(use)

    def _weights_like(self, g: Tensor) -> Tensor:
        """Return factors in [1/2, 1) for the entries of a sample, ``g.shape[1:]``: the fractions of multiples of the golden ratio."""
        count = math.prod(g.shape[1:])
        if count > self._weights.numel() or self._weights.dtype != g.dtype:
            numbers = torch.arange(1, count + 1, dtype=torch.float64, device=g.device)
            self._weights = (0.5 + 0.5 * (numbers * GOLDEN).frac_()).to(g.dtype)
        return self._weights[:count].view(g.shape[1:])

    def _add_sum(self, name: str, total: Tensor) -> None:
        known = self.sums[-1]
        known[name] = known[name] + total if name in known else total

    def finish(self) -> None:
        """Compute the moments of the current objective, if there is one."""
        uses, self._uses = self._uses, {}
        if len(self.tables) < len(self.sums):
            self.tables.append(self._moments(uses) if uses else None)

    def _moments(self, uses: Mapping[str, Sequence[Use]]) -> MomentTable:
        task = self._task.restricted(uses.keys())
        table = MomentTable(replace(task, wanted=frozenset({"sum", 2.0}), objectives=task.objectives[:1]))
        table.begin(0, self._scales[-1])
        with Silence(self._scales[-1].device.type):
            for name, of_calls in uses.items():
                table.add(name, combined(of_calls))
        table.finish()
        return table


def _cancelled(slots: Collection[str], g: Tensor, mixes_features: bool) -> Collection[str]:
    """Return the slots whose sums are zero by a symmetry of the output gradient, which any of a few samples shows.

    If the sums over the features are zero, those of all slots are; if only the sums over all entries are, those of biases.

    Args:
        slots: The slots.
        g: The gradient of the output.
        mixes_features: Whether the sum of the weight's gradient has a sum over all features.
    """
    few = at_least_float32(g[:: max(1, len(g) // FEW)][:FEW])
    features = few.sum(min(2, g.ndim - 1))  # the channels of images, or the features of positions
    size, total = _of_samples(few.abs()), _of_samples(features).abs()
    limit = max(CANCELLED, 16 * torch.finfo(g.dtype).eps) * size
    if not bool((total <= limit).any()):  # if the sums over the features are zero, so is their total
        return ()
    known = (size > 0) | (size == 0).all()  # a gradient of zero shows nothing about the others
    are_zero = _of_samples(features.abs()) <= limit
    if g.ndim > 3:
        are_zero |= _of_samples(few.sum(-1).abs()) <= limit
    biases = {slot for slot in slots if "bias" in slot}
    if bool((are_zero & known).any()):
        return slots if mixes_features else biases
    are_zero = total <= limit / 16
    return biases if biases and bool((are_zero & known).any()) else ()


def _of_samples(tensor: Tensor) -> Tensor:
    """Return the sum of each sample's entries ``(N,)``, without a copy of images in the channels-last layout."""
    # With the further axis, a vector has an axis to sum over: ``sum(())`` would add all samples.
    return tensor.unsqueeze(-1).sum(tuple(range(1, tensor.ndim + 1)))
