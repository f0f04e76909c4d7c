"""Checks every row of a batch: the sums of the entries of all gradients are computed a second time, without the rules.

The comparison of a few samples with autograd misses a rule that is wrong for another row. For a layer that is linear in its
parameters, the sum of the entries of a sample's gradient is ``sum_p g_p f(x; 1)_p``, with a weight of ones. It takes a small part
of the time of the layer, because all output channels of ``f(x; 1)`` are equal.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_gradmetrics.engine.plan import Source
from lightning_gradmetrics.engine.rules import Call, Rule
from lightning_gradmetrics.gradients.precision import at_least_float32, rounding
from lightning_gradmetrics.gradients.scaling import rescaled_rows

if TYPE_CHECKING:
    from lightning_gradmetrics.engine.gather import MomentTable

__all__ = ["RowSums"]

FRACTION = 0.01
"""Largest difference as a fraction of the usual tolerance: both sums come from the same inputs and gradients.

The largest that was measured on 19 models in float32 is 2e-7, which is 2 % of what is allowed.
"""


class RowSums:
    """The sums of the entries of each sample's gradient, for each objective and parameter whose layers have a second formula."""

    def __init__(self) -> None:
        self._sums: list[dict[str, Tensor]] = []
        self._undo: list[Tensor] = []
        self._unknown: set[str] = set()

    def clear(self) -> None:
        """Delete all sums."""
        self._sums, self._undo, self._unknown = [], [], set()

    def begin(self, undo: Tensor) -> None:
        """Begin an objective; multiplying by ``undo`` ``(N,)`` removes the scale of its gradients."""
        self._sums.append({})
        self._undo.append(undo)

    def add(self, rule: Rule, call: Call, slots: Mapping[str, Source], g: Tensor) -> None:
        """Add a call of a layer.

        Args:
            rule: Its rule.
            call: The call.
            slots: The source of each of its arguments whose gradient is wanted.
            g: The gradient of its output, in the form that the rule takes.
        """
        sums = {} if g.is_complex() else _sums(rule, call, g)
        for slot, source in slots.items():
            if not isinstance(source, str):
                continue  # a derived tensor, whose parameters are in no sum
            if slot not in sums:
                self._unknown.add(source)
                continue
            known = self._sums[-1]
            known[source] = known[source] + sums[slot] if source in known else sums[slot]

    def leave_out(self, names: set[str]) -> None:
        """Compare no sums of some parameters, because they are used in other ways too."""
        self._unknown |= names

    def differing(self, table: MomentTable) -> list[int]:
        """Return the numbers of the samples for which a sum in a table is another one, the largest difference first."""
        wanted, parameters = table.task.wanted, table.task.parameters
        worst = torch.zeros(table.task.size, dtype=torch.float64)
        for objective, sums in enumerate(self._sums):
            names = [name for name in sums if name not in self._unknown and name in parameters]
            if not names or not {"sum", 2.0} <= wanted:
                continue
            moments = table.of_samples(slice(0, table.task.size), names, objective)
            entries = worst.new_tensor([max(parameters[name].numel(), 1) for name in names])
            allowed = worst.new_tensor([FRACTION * rounding(parameters[name]) for name in names])
            norms = moments[2.0].double().cpu().sqrt()
            norms = norms + LEVEL * norms.amax(1, keepdim=True)
            expected = torch.stack([sums[name].double().cpu() for name in names], 1)
            expected = rescaled_rows(expected, self._undo[objective].cpu())
            error = (moments["sum"].double().cpu() - expected).abs()
            relative = error / (allowed * entries.sqrt() * norms + torch.finfo(torch.float64).tiny)
            worst = torch.maximum(worst, relative.where(expected.isfinite(), 0.0).amax(1))
        numbers: list[int] = worst.argsort(descending=True)[: int((worst > 1).sum())].tolist()
        return numbers


def _sums(rule: Rule, call: Call, g: Tensor) -> dict[str, Tensor]:
    """Return the sums of the gradients of a call, ``(N,)`` by slot; slots for which they are unknown are left out."""
    if rule.sums is not None:
        return rule.sums(call, g)
    sums: dict[str, Tensor] = {}
    for slot in call.slots if rule.function is not None else ():
        slope = _slope(rule, call, slot)
        if slope is not None:
            sums[slot] = (call.out.split(slope).reshape(g.shape) * g).flatten(1).sum(1)
    return sums


def _slope(rule: Rule, call: Call, slot: str) -> Tensor | None:
    """Return how a call's output changes if all entries of one parameter grow by one; ``None`` if it is not linear in it."""
    values = {**call.values}
    given = list(itertools.takewhile(values.__contains__, rule.arguments))
    others = [name for name in rule.arguments[len(given) :] if name in values]
    outputs: list[Tensor] = []
    for step in (-1, 0, 1):
        values[slot] = call.values[slot] + step
        result = rule.function(*map(values.__getitem__, given), **{name: values[name] for name in others})
        outputs.append(at_least_float32(result))
    before, after = outputs[1] - outputs[0], outputs[2] - outputs[1]
    is_linear = bool((after - before).abs().amax() <= rounding(after) * after.abs().amax())
    return after if is_linear else None


LEVEL = 1e-3
"""Gradients smaller than this fraction of the sample's largest one may differ by as much as one of that size."""
