"""Checks every row of a batch: the sums of the entries of all gradients are computed a second time, without the rules.

The comparison of a few samples with autograd misses a rule that is wrong for another row. For a layer that is linear in its
parameters, the sum of the entries of a sample's gradient is ``sum_p g_p f(x; 1)_p``, with a weight of ones. It takes a small part
of the time of the layer, because all output channels of ``f(x; 1)`` are equal.

If sums and L2 norms are not wanted, a second table has them too, and must agree with the first one.

The gradients of a sample's logits under cross-entropy add up to zero, and so do those before a layer norm. Such a sum is zero for
wrong rows too. So these calls are compared with other weights (`passes/weighted_sums.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lightning_gradmetrics.engine.passes.agreement import are_close
from lightning_gradmetrics.engine.passes.gather import MomentTable
from lightning_gradmetrics.engine.passes.plan import Source
from lightning_gradmetrics.engine.passes.weighted_sums import WeightedSums
from lightning_gradmetrics.engine.rules import Call, Rule
from lightning_gradmetrics.engine.rules.sums import sums_of
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.uses import Use
from lightning_gradmetrics.gradients.precision import rounding
from lightning_gradmetrics.gradients.scaling import rescaled_rows
from lightning_gradmetrics.gradients.statistics import Moment

__all__ = ["RowSums"]

FRACTION = 0.01
"""Largest difference as a fraction of the usual tolerance: both sums come from the same inputs and gradients.

The largest that was measured on 19 models in float32 is 2e-7, which is 2 % of what is allowed.
"""


_COMPARED: frozenset[Moment] = frozenset({"sum", 2.0})
"""The moments that the comparison needs."""


class RowSums:
    """The sums of the entries of each sample's gradient, for each objective and parameter whose layers have a second formula.

    Args:
        task: The batch.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self.clear()

    def clear(self) -> None:
        """Begin without any sums."""
        self._second, self._weighted = _second_table(self._task), WeightedSums(self._task)
        self._sums: list[dict[str, Tensor]] = []
        self._undo: list[Tensor] = []
        self._unknown: set[str] = set()

    def begin(self, objective: int, undo: Tensor) -> None:
        """Begin an objective; multiplying by ``undo`` ``(N,)`` removes the scale of its gradients."""
        self._sums.append({})
        self._undo.append(undo)
        self._weighted.begin(undo)
        if self._second is not None:
            self._second.begin(objective, undo)

    def sink(self, first: Callable[[str, Use], None]) -> Callable[[str, Use], None]:
        """Return a function that passes the uses of each parameter to the first table and, if there is one, to the second."""
        second = self._second
        if second is None:
            return first

        def both(name: str, use: Use) -> None:
            first(name, use)
            second.add(name, use)

        return both

    def finish(self) -> None:
        """Compute the moments of the other tables."""
        self._weighted.finish()
        if self._second is not None:
            self._second.finish()

    def add(self, rule: Rule, call: Call, slots: Mapping[str, Source], g: Tensor) -> None:
        """Add a call of a layer.

        Args:
            rule: Its rule.
            call: The call.
            slots: The source of each of its arguments whose gradient is wanted.
            g: The gradient of its output, in the form that the rule takes.
        """
        sums = {} if g.is_complex() else sums_of(rule, call, g)
        self._weighted.add(rule, call, slots, g, sums)
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
        """Return the numbers of the samples for which a sum or a moment in a table is another one, the largest difference first."""
        compared, weighted = table if self._second is None else self._second, self._weighted
        known = [name for name in compared.task.parameters if name not in self._unknown]
        worst = torch.zeros(self._task.size, dtype=torch.float64)
        for objective, (undo, sums) in enumerate(zip(self._undo, self._sums, strict=True)):
            errors = [_relative_errors(compared, objective, sums, undo, known)]
            other, other_sums = weighted.tables[objective], weighted.sums[objective]
            if other is not None:
                errors.append(_relative_errors(other, 0, other_sums, undo, other_sums))
            worst = torch.stack([worst, *errors]).amax(0)
            if compared is not table:
                worst[~_agree(table, compared, objective)] = torch.inf
        wrong = (worst > 1).nonzero().flatten()
        numbers: list[int] = wrong[worst[wrong].argsort(descending=True)].tolist()
        return numbers


def _relative_errors(
    table: MomentTable, objective: int, sums: Mapping[str, Tensor], undo: Tensor, known: Collection[str]
) -> Tensor:
    """Return the largest difference of each sample's sums from those in a table, in units of what is allowed, ``(N,)``.

    Args:
        table: The table.
        objective: The number of the objective.
        sums: The sums by parameter, ``(N,)`` each.
        undo: The factors ``(N,)`` that remove the scale of the gradients.
        known: The parameters to compare.
    """
    task, size = table.task, table.task.size
    names = [name for name in task.parameters if name in sums and name in known]
    if not names or not task.wanted >= _COMPARED:
        return torch.zeros(size, dtype=torch.float64)
    moments = table.of_samples(slice(0, size), names, objective)
    entries = _entries(task, names)
    allowed = entries.new_tensor([FRACTION * rounding(task.parameters[name]) for name in names])
    norms = _wide(moments[2.0]).sqrt()
    norms = norms + LEVEL * norms.amax(1, keepdim=True)
    expected = rescaled_rows(torch.stack([sums[name].double().cpu() for name in names], 1), undo.cpu())
    found = _wide(moments["sum"])
    error = (found - expected).abs()
    relative = error / (allowed * entries.sqrt() * norms + torch.finfo(torch.float64).tiny)
    relative = relative.where(found.isfinite(), torch.inf)  # a comparison with NaN finds nothing
    return relative.where(expected.isfinite(), 0.0).amax(1)


def _second_table(task: Task) -> MomentTable | None:
    """Return a table with the moments of a batch and those that the comparison needs; ``None`` if the batch has them.

    Complex parameters have norms only.
    """
    names = [name for name, parameter in task.parameters.items() if not parameter.is_complex()]
    if task.wanted >= _COMPARED or not names:
        return None
    return MomentTable(replace(task.restricted(names), wanted=task.wanted | _COMPARED))


def _entries(task: Task, names: Iterable[str]) -> Tensor:
    """Return the number of entries of some parameters, ``(P,)``."""
    return torch.tensor([max(task.parameters[name].numel(), 1) for name in names], dtype=torch.float64)


def _agree(table: MomentTable, second: MomentTable, objective: int) -> Tensor:
    """Return for each sample whether a second table has the moments of the first one, up to rounding, ``(N,)``."""
    parameters, every = second.task.parameters, slice(0, table.task.size)
    found = {key: _wide(value) for key, value in table.of_samples(every, parameters, objective).items()}
    expected = {key: _wide(value) for key, value in second.of_samples(every, parameters, objective).items()}
    norms = expected[2.0].sqrt()
    level = norms + LEVEL * norms.amax(1, keepdim=True)
    allowed = level.new_tensor(list(map(rounding, parameters.values())))
    return are_close(found, expected, level, _entries(second.task, parameters), allowed).all(1)


def _wide(moment: Tensor) -> Tensor:
    """Return a moment of real parameters on the CPU in float64; the table is complex if other parameters are."""
    return (moment.real if moment.is_complex() else moment).double().cpu()


LEVEL = 1e-3
"""Gradients smaller than this fraction of the sample's largest one may differ by as much as one of that size."""
