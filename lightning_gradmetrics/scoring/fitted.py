"""Scores that are fitted before they are used: measured, accumulated over a dataloader in bounded memory, finished.

A fitted score is a class of four plain functions, registered with :func:`register_fitted`:

- ``measure(evidence, **arguments)``: what it looks at, ``{name: (N, ...)}``, when it is fitted and when it scores
  alike;
- ``accumulate(evidence, measured, **arguments)``: one batch's contribution, ``{name: tensor}``. Contributions of
  batches and of processes add up; those named ``rows/...``, ``(N, ...)``, one row a sample, are kept row by row: a
  uniform sample of at most :data:`MAX_ROWS` samples and :data:`MAX_ENTRIES` entries; those named ``model/...`` are the
  model's own, the same in every batch, and are taken once;
- ``finish(total, **arguments)``: from the total of the contributions to the state, ``{name: tensor}``;
- ``score(measured, state, **arguments)``: the uncertainties ``(N,)``.

A score whose ``accumulate`` looks at ``evidence.outside`` is fitted on in- and out-of-distribution samples; all others
see the in-distribution samples only. Rows come to ``finish`` in an order of their own: the state does not depend on
batches or processes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.classifier.forward import Inputs, gradients_enabled, tensors_in
from lightning_gradmetrics.gradients.statistics import accumulator
from lightning_gradmetrics.scoring.evidence import Evidence, Needs, needs_of
from lightning_gradmetrics.scoring.registry import RECIPES, Family, Recipe, Score

__all__ = [
    "MAX_ENTRIES",
    "MAX_ROWS",
    "FittedRecipe",
    "FittedScore",
    "RunningTotal",
    "Tensors",
    "add",
    "register_fitted",
    "row_keys",
]

Tensors = dict[str, Tensor]

MAX_ROWS = 50_000
"""Samples kept of contributions named ``rows/...``: a uniform sample of all that were seen."""

MAX_ENTRIES = 2**25
"""Entries kept of them: of wide rows, fewer samples."""

KEY = "rows/key"
"""The row that orders and samples the others: a number made of each sample's input."""


@dataclass(frozen=True)
class FittedRecipe(Recipe):
    """A registered fitted score. Calling it with arguments makes a :class:`FittedScore` that is not fitted yet."""

    functions: Any = None

    @property
    def documentation(self) -> str:
        """The class's docstring."""
        return inspect.getdoc(self.functions) or ""

    def __call__(self, *, name: str | None = None, **arguments: Any) -> FittedScore:
        """The score with these arguments, not fitted yet."""
        made = super().__call__(name=name, **arguments)
        return FittedScore(made.name, self, made.arguments)


@dataclass(frozen=True)
class FittedScore(Score):
    """A fitted score: a callable from evidence to uncertainties ``(N,)`` once it has a state.

    Args:
        name: The column in the results.
        recipe: What it was made of.
        arguments: Its keyword arguments.
        state: What was fitted, or ``None``.
        model: The fingerprint of the model that it was fitted for.
        head: The name of the head that it was fitted for, where it looks at the head.
    """

    state: Tensors | None = None
    model: str | None = None
    head: str | None = None

    @property
    def _functions(self) -> Any:
        return self.recipe.functions  # type: ignore[attr-defined]

    def __call__(self, evidence: Evidence) -> Tensor:
        """Uncertainty of every sample, ``(N,)``.

        Raises:
            ValueError: If it is not fitted.
        """
        if self.state is None:
            raise ValueError(_not_fitted(self.name))
        state = {key: _beside(value, evidence.given_logits) for key, value in self.state.items()}
        measured = self._functions.measure(evidence, **self.arguments)
        return self._functions.score(measured, state, **self.arguments)  # type: ignore[no-any-return]

    @property
    def needs(self) -> Needs:
        """What it looks at when it scores."""
        return needs_of([self])

    @property
    def fit_needs(self) -> Needs:
        """What it looks at when it is fitted."""
        return needs_of([self.contribution])  # type: ignore[list-item]

    def look(self, evidence: Evidence) -> None:
        """Look at everything that scoring needs: the dry run, which needs no state."""
        self._functions.measure(evidence, **self.arguments)

    def contribution(self, evidence: Evidence, keys: Tensor | None = None) -> Tensors:
        """One batch's contribution to the fit; ``keys`` ``(N,)`` order the rows."""
        measured = self._functions.measure(evidence, **self.arguments)
        found: Tensors = {
            key: value.detach()
            for key, value in self._functions.accumulate(evidence, measured, **self.arguments).items()
        }
        if keys is not None and any(_is_rows(key) for key in found):
            found[KEY] = keys
        return {key: value.cpu() if _is_rows(key) else value for key, value in found.items()}

    def fitted(self, total: Tensors, model: str, head: str | None = None) -> FittedScore:
        """The score with the state that the total of all contributions gives."""
        with gradients_enabled():
            ordered = {key: value.clone() for key, value in _sampled(total).items() if key != KEY}
            state = self._functions.finish(ordered, **self.arguments)
        return replace(
            self, state={key: value.detach().cpu().contiguous() for key, value in state.items()}, model=model, head=head
        )


def _not_fitted(name: str) -> str:
    return (
        f"the score {name!r} is not fitted: call GradientMetrics.fit(trainer, model, dataloader) first, or "
        "lightning_gradmetrics.fit without a Trainer, or load its state with load_fitted"
    )


def _beside(value: Tensor, other: Tensor) -> Tensor:
    """On the other's device, in the precision that it has there."""
    if value.is_floating_point():
        return value.to(other.device, accumulator(other))
    return value.to(other.device)


def register_fitted(family: Family, paper: str) -> Callable[[type], FittedRecipe]:
    """Register a class of four functions as the fitted score of its name.

    The class's docstring and the keyword arguments of ``measure`` are those of the score.

    Args:
        family: ``"baseline"`` or ``"gradient"``.
        paper: Where the score comes from.
    """

    def decorate(functions: type) -> FittedRecipe:
        measure = functions.measure  # type: ignore[attr-defined]
        recipe = FittedRecipe(functions.__name__, measure, family, paper, functions)
        RECIPES[recipe.name] = recipe
        return recipe

    return decorate


# Totals


def _is_rows(key: str) -> bool:
    return key.startswith("rows/")


def _is_models(key: str) -> bool:
    return key.startswith("model/")


def row_keys(inputs: Inputs) -> Tensor:
    """A whole number for each sample, spread evenly and made of its input's bits: ``(N,)``, int64, on the CPU.

    It depends neither on the batch nor on the device, so the rows that are kept, and their order, do not either.
    """
    keys = torch.zeros((), dtype=torch.int64)
    for number, tensor in enumerate(tensors_in(inputs)):
        if tensor.ndim:
            keys = keys * 31 + _hashed(tensor.detach(), number)
    keys = (keys ^ (keys >> 29)) * 0x1B873593CC9E2D51
    return keys ^ (keys >> 32)


def _hashed(tensor: Tensor, seed: int) -> Tensor:
    """Sums of each row's bits with random odd weights; of a long row, of 4096 entries of it."""
    flat = tensor.reshape(len(tensor), -1)
    if flat.shape[1] > 4096:
        flat = flat[:, torch.linspace(0, flat.shape[1] - 1, 4096, device=flat.device).long()]
    flat = flat.contiguous().cpu()
    if flat.is_floating_point():
        flat = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(-(2**62), 2**62, flat.shape[1:], generator=generator) * 2 + 1
    return (flat.long() * weights).sum(1)


def add(totals: Sequence[Tensors]) -> Tensors:
    """The total of contributions: sums, and of rows a uniform sample, whatever the order or grouping."""
    present = [total for total in totals if total]
    if not present:
        return {}
    return _sampled({key: _joined(key, [total[key] for total in present]) for key in present[0]})


def _joined(key: str, values: Sequence[Tensor]) -> Tensor:
    if _is_models(key):
        return values[0].cpu()
    return torch.cat(list(values)) if _is_rows(key) else _sum(values)


def _sum(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.cpu() for value in values]).sum(0)


def _cap(rows: Tensors) -> int:
    width = sum(value[:1].numel() for key, value in rows.items() if _is_rows(key))
    return max(1, min(MAX_ROWS, MAX_ENTRIES // max(1, width)))


def _sampled(total: Tensors) -> Tensors:
    """At most as many rows as are kept, in the order of their keys."""
    if KEY not in total:
        return total
    keep = total[KEY].argsort(stable=True)[: _cap(total)]
    return {key: value[keep] if _is_rows(key) else value for key, value in total.items()}


@dataclass
class RunningTotal:
    """A total that takes one contribution after the other; it holds at most twice the rows that are kept."""

    sums: Tensors = field(default_factory=dict)
    rows: list[Tensors] = field(default_factory=list)
    waiting: int = 0

    def add(self, contribution: Tensors) -> None:
        """Add a batch's contribution."""
        for key, value in contribution.items():
            if _is_models(key):
                self.sums.setdefault(key, value)
            elif not _is_rows(key):
                self.sums[key] = self.sums[key] + value if key in self.sums else value
        rows = {key: value for key, value in contribution.items() if _is_rows(key)}
        if rows:
            self.rows.append(rows)
            self.waiting += len(rows[KEY])
            if self.waiting > 2 * _cap(rows):
                self.rows = [add(self.rows)]
                self.waiting = len(self.rows[0][KEY])

    @property
    def total(self) -> Tensors:
        """The total so far, on the CPU."""
        return {**{key: value.cpu() for key, value in self.sums.items()}, **add(self.rows)}
