"""Scores that are fitted before they are used: measured, accumulated over a dataloader in bounded memory, finished, saved.

A fitted score is a class of four plain functions, registered with :func:`register_fitted`:

- ``measure(evidence, **arguments)``: what it looks at, ``{name: (N, ...)}``, when it is fitted and when it scores alike;
- ``accumulate(evidence, measured, **arguments)``: one batch's contribution, ``{name: tensor}``. Contributions of batches and of
  processes add up; those named ``rows/...``, ``(N, ...)``, are kept row by row, a uniform sample of at most :data:`MAX_ROWS`;
- ``finish(total, **arguments)``: from the total of the contributions to the state, ``{name: tensor}``;
- ``score(measured, state, **arguments)``: the uncertainties ``(N,)``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.evidence import Evidence, Needs, needs_of
from lightning_gradmetrics.scores.registry import RECIPES, Family, Recipe, Score

__all__ = [
    "MAX_ROWS",
    "FittedRecipe",
    "FittedScore",
    "Tensors",
    "add",
    "fingerprint",
    "load_fitted",
    "register_fitted",
    "save_fitted",
]

Tensors = dict[str, Tensor]

MAX_ROWS = 50_000
"""Rows kept of contributions named ``rows/...``: a uniform sample of all that were seen."""


@dataclass(frozen=True)
class FittedRecipe(Recipe):
    """A registered fitted score. Calling it with arguments makes a :class:`FittedScore` that is not fitted yet."""

    functions: Any = None

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
    """

    state: Tensors | None = None
    model: str | None = None

    @property
    def _functions(self) -> Any:
        return self.recipe.functions  # type: ignore[attr-defined]

    def __call__(self, evidence: Evidence) -> Tensor:
        """Uncertainty of every sample, ``(N,)``.

        Raises:
            ValueError: If it is not fitted.
        """
        if self.state is None:
            raise ValueError(
                f"the score {self.name!r} is not fitted: call GradientMetrics.fit(trainer, model, dataloader) first, or load its state with "
                "load_fitted"
            )
        measured = self._functions.measure(evidence, **self.arguments)
        device = evidence.logits.device
        return self._functions.score(measured, {key: value.to(device) for key, value in self.state.items()}, **self.arguments)  # type: ignore[no-any-return]

    @property
    def needs(self) -> Needs:
        """What it looks at when it scores."""
        return needs_of([self])

    def look(self, evidence: Evidence) -> None:
        """Look at everything that scoring needs: the dry run, which needs no state."""
        self._functions.measure(evidence, **self.arguments)

    def contribution(self, evidence: Evidence) -> Tensors:
        """One batch's contribution to the fit, on the CPU."""
        measured = self._functions.measure(evidence, **self.arguments)
        found: Tensors = self._functions.accumulate(evidence, measured, **self.arguments)
        rows = [value for key, value in found.items() if key.startswith("rows/")]
        if rows:
            found["rows/priority"] = _priority(rows)
        return {key: value.detach().cpu() for key, value in found.items()}

    def fitted(self, total: Tensors, model: str) -> FittedScore:
        """The score with the state that the total of all contributions gives."""
        state = self._functions.finish({key: value for key, value in total.items() if key != "rows/priority"}, **self.arguments)
        return replace(self, state={key: value.detach().cpu().contiguous() for key, value in state.items()}, model=model)


def _priority(rows: Sequence[Tensor]) -> Tensor:
    """A number in [0, 1) for each row, spread evenly and made of its content: the sample is the same in any order and grouping."""
    flat = torch.cat([value.detach().double().cpu().reshape(len(value), -1) for value in rows], 1)
    weights = torch.rand(flat.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (flat @ weights).mul(1e5).sin().mul(1e4).frac().abs()


def register_fitted(family: Family, paper: str) -> Callable[[type], FittedRecipe]:
    """Register a class of four functions (``measure``, ``accumulate``, ``finish``, ``score``) as the fitted score of its name.

    Args:
        family: ``"baseline"`` or ``"gradient"``.
        paper: Where the score comes from.
    """

    def decorate(functions: type) -> FittedRecipe:
        recipe = FittedRecipe(functions.__name__, functions.measure, family, paper, functions)  # type: ignore[attr-defined]
        RECIPES[recipe.name] = recipe
        return recipe

    return decorate


def add(totals: Sequence[Tensors]) -> Tensors:
    """The total of contributions: sums, and of rows a uniform sample of at most :data:`MAX_ROWS`, whatever the order or grouping."""
    present = [total for total in totals if total]
    if not present:
        return {}
    merged = {
        key: torch.cat([t[key] for t in present]) if key.startswith("rows/") else torch.stack([t[key] for t in present]).sum(0) for key in present[0]
    }
    if "rows/priority" in merged and len(merged["rows/priority"]) > MAX_ROWS:
        keep = merged["rows/priority"].topk(MAX_ROWS).indices
        merged |= {key: value[keep] for key, value in merged.items() if key.startswith("rows/")}
    return merged


def fingerprint(model: nn.Module) -> str:
    """Of the model that a state is fitted for: the names, shapes and values of its parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        value = parameter.detach().double()
        digest.update(repr((name.rpartition("_orig_mod.")[2], tuple(value.shape))).encode())
        digest.update(torch.stack([value.sum(), value.abs().sum(), value.square().sum()]).cpu().numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()[:16]


def save_fitted(scores: Iterable[Score], directory: str | Path) -> list[Path]:
    """Write the state of each fitted score to ``directory/<name>.safetensors``: tensors and text, nothing that could run.

    Raises:
        ValueError: If a fitted score has no state.
    """
    from safetensors.torch import save_file

    folder, written = Path(directory), []
    folder.mkdir(parents=True, exist_ok=True)
    for score in scores:
        if not isinstance(score, FittedScore):
            continue
        if score.state is None:
            raise ValueError(f"the score {score.name!r} is not fitted, so there is nothing to save")
        about = {"score": score.recipe.name, "arguments": json.dumps(dict(score.arguments), sort_keys=True, default=str), "model": score.model or ""}
        path = folder / f"{score.name}.safetensors"
        save_file(score.state, path, metadata=about)
        written.append(path)
    return written


def load_fitted(scores: Iterable[Score], directory: str | Path, model: nn.Module) -> tuple[Score, ...]:
    """The scores with the states that :func:`save_fitted` wrote.

    Raises:
        FileNotFoundError: If there is no state for a fitted score.
        ValueError: If a state was made for another model, another head, another score or other arguments.
    """
    return tuple(_load(score, Path(directory), model) if isinstance(score, FittedScore) else score for score in scores)


def _load(score: FittedScore, folder: Path, model: nn.Module) -> FittedScore:
    from safetensors import safe_open

    path = folder / f"{score.name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no state of the score {score.name!r} in {str(folder)!r}: fit it first, and save it with save_fitted")
    with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
        about: Mapping[str, str] = file.metadata()
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    wanted = {
        "score": score.recipe.name,
        "arguments": json.dumps(dict(score.arguments), sort_keys=True, default=str),
        "model": fingerprint(model),
    }
    for key, value in wanted.items():
        if about.get(key) != value:
            raise ValueError(
                f"the state in {str(path)!r} was made for another {key} ({about.get(key)}, and this is {value}): fit the score again for this one"
            )
    return replace(score, state=state, model=about["model"])

