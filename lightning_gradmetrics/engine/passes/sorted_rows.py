"""Steps for rows in the order of a sort: products of groups, and rows of a table that are looked up by the keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor

from lightning_gradmetrics.engine.passes.plan import PlanError, Source, Step
from lightning_gradmetrics.engine.passes.tracer_state import TracerState
from lightning_gradmetrics.engine.rules import RULES, Call, Rule, bind
from lightning_gradmetrics.engine.tracing.axes import Axis
from lightning_gradmetrics.engine.uses import EmbeddingUse, Use

__all__ = ["SortedRows"]


class SortedRows(TracerState):
    """The part of a tracer that runs steps with sorted rows."""

    _collecting = True
    _recomputes = False
    _last = False

    def _expect(self, source: Source) -> None:
        """Count one more use of the parameters behind a source."""
        raise NotImplementedError

    def _arrive(self, source: Source, use: Use) -> None:
        """Collect a use."""
        raise NotImplementedError

    def _collecting_from(
        self, sources: Collection[Source], x: Tensor, g: Tensor, axis: Axis
    ) -> AbstractContextManager[Any]:
        """Return a context for the computation of uses, after the notes of a verification."""
        raise NotImplementedError

    def _grouped(self, step: Step, args: Any, kwargs: Any) -> Any:
        """Run a product of sorted rows; the indices of the sort show the sample of each row."""
        self._require_plain_pass()
        rule = RULES[step.function]
        slots = self._slots(bind(rule, args, kwargs) or {})
        values = bind(rule, self._cut(args), self._cut(kwargs)) or {}
        values["owners"] = self._owners_in_groups(values)
        result = self._rooted(step, step.function(*self._cut(args), **self._cut(kwargs)))
        for source in slots.values():
            self._expect(source)
        axis = Axis(0, len(values["owners"]) // self.size)
        call = Call(values, axis, axis, frozenset(slots))
        result.register_hook(partial(self._grouped_gradient, rule, call, slots, values["input"]._version))  # type: ignore[no-untyped-call]
        return result

    def _require_plain_pass(self) -> None:
        if not self._collecting or self._recomputes or self.recorder is not None:
            raise PlanError("sorted rows are no part of a checkpoint or a known path")

    def _grouped_gradient(self, found: Rule, call: Call, slots: Mapping[str, Source], version: int, g: Tensor) -> None:
        if call.values["input"]._version != version:
            raise PlanError("a layer's input was changed in place after its use")
        by_sample = call.values["owners"].argsort(stable=True)
        with self._collecting_from(slots.values(), call.values["input"], g[by_sample], call.out):
            for slot, use in found.uses(call, g):
                self._arrive(slots[slot], use)
        if self._last:
            call.values.clear()

    def _looked_up(self, step: Step, args: Any, kwargs: Any) -> Any:
        """Look up rows of a table by an integer of each sorted row."""
        self._require_plain_pass()
        table, index = self._cut(args)
        (source,) = step.sources
        owners = self._owners_in_order(step.sort, len(index))
        result = self._rooted(step, step.function(table, index))
        self._expect(source)
        hook = partial(self._looked_up_gradient, source, tuple(table.shape), index.remainder(len(table)), owners)
        result.register_hook(hook)  # type: ignore[no-untyped-call]
        return result

    def _looked_up_gradient(
        self, source: Source, shape: tuple[int, ...], index: Tensor, owners: Tensor, g: Tensor
    ) -> None:
        times = len(owners) // self.size
        by_sample = owners.argsort(stable=True)
        rows = g[by_sample]
        with self._collecting_from([source], rows, rows, Axis(0, times)):
            indices = index[by_sample].view(self.size, times)
            self._arrive(source, EmbeddingUse(indices, rows.view(self.size, times, shape[1]), shape))
