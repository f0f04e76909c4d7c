"""The base class of scores that are fitted on held-out data, in one pass and bounded memory, before they can score."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor
from typing_extensions import dataclass_transform

from lightning_gradmetrics.classifier.forward import gradients_enabled
from lightning_gradmetrics.gradients.statistics import accumulator
from lightning_gradmetrics.scoring.dry_run import Needs, needs_of
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.positions import by_rows
from lightning_gradmetrics.scoring.recipes import Recipe, Score, _dry_run
from lightning_gradmetrics.scoring.totals import KEY, Tensors, is_rows, sampled

__all__ = ["FittedScore", "averaged", "fitted_scores", "not_fitted", "plain_scores"]

F = TypeVar("F", bound="FittedScore")

METHODS = ("measure", "accumulate", "finish", "score")
RESERVED = ("name", "recipe", "arguments", "state", "model", "head", "needs", "fit_needs")


@dataclass_transform(kw_only_default=True)
class FittedScore(Score):
    """The base class of fitted scores. A subclass declares its arguments as fields with defaults, and four methods.

    ``accumulate`` returns tensors by name. They are summed over batches and processes, except two kinds:

    - ``rows/...``, ``(N, ...)``, one row per sample, are collected: a uniform sample of at most
      :data:`~lightning_gradmetrics.scoring.totals.MAX_ROWS` samples, in an order that does not depend on batches or
      processes;
    - ``model/...`` depend only on the model, are equal in every batch, and are stored once.

    A score whose ``accumulate`` reads ``evidence.ood`` is fitted on in- and out-of-distribution samples. All others are
    fitted on the in-distribution samples only.

    Args:
        name: The column in the results.
        **arguments: The fields.

    Attributes:
        state: The fitted tensors by name, or ``None`` before the fit.
        model: The fingerprint of the model that the score was fitted for.
        head: The name of the head that the score was fitted for, if it reads the head's input.

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If an argument has a value that is not allowed.

    Example:
        >>> import torch, lightning_gradmetrics as lgm
        >>> class distance_to_mean(FittedScore):
        ...     "Distance of the head's input to its mean over in-distribution data."
        ...     p: float = 2.0
        ...     def measure(self, evidence):
        ...         return {"features": evidence.features}
        ...     def accumulate(self, evidence, measured):
        ...         return {"sum": measured["features"].sum(0), "count": torch.tensor(len(measured["features"]))}
        ...     def finish(self, total):
        ...         return {"mean": total["sum"] / total["count"]}
        ...     def score(self, measured, state):
        ...         return torch.linalg.vector_norm(measured["features"] - state["mean"], self.p, 1)
        >>> model, images = torch.nn.Linear(4, 3), torch.randn(8, 4)
        >>> fitted = lgm.fit(model, [images], distance_to_mean(p=1.0))
        >>> lgm.score(model, images, fitted)["distance_to_mean(p=1.0)"].shape
        torch.Size([8])
    """

    recipe: Recipe
    state: Tensors | None
    model: str | None
    head: str | None
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls) -> None:
        cls.__signature__ = inspect.Signature([*_fields(cls).values()])
        cls.__signature__ = Recipe(cls.__name__, cls, "gradient", "").signature.replace(return_annotation=cls)
        cls.recipe = Recipe(cls.__name__, cls, "gradient", "")

    def __init__(self, *, name: str | None = None, **arguments: Any) -> None:
        recipe = type(self).recipe
        recipe.check_names(arguments)
        self.state = self.model = self.head = None
        for key, default in recipe.defaults.items():
            setattr(self, key, arguments.get(key, default))
        super().__init__(name or recipe.name_of(arguments), recipe, arguments)

    def measure(self, evidence: Evidence) -> Tensors:
        """Return the values that both the fit and the score are computed from, ``{name: (N, ...)}``."""
        raise NotImplementedError(_lacking(type(self), "measure"))

    def accumulate(self, evidence: Evidence, measured: Tensors) -> Tensors:
        """Return one batch's contribution to the fit, ``{name: tensor}``."""
        raise NotImplementedError(_lacking(type(self), "accumulate"))

    def finish(self, total: Tensors) -> Tensors:
        """Compute the state, ``{name: tensor}``, from the total of all contributions."""
        raise NotImplementedError(_lacking(type(self), "finish"))

    def score(self, measured: Tensors, state: Tensors) -> Tensor:
        """Return the uncertainties ``(N,)``."""
        raise NotImplementedError(_lacking(type(self), "score"))

    def _values(self, evidence: Evidence) -> Tensor:
        if self.state is None:
            raise ValueError(not_fitted(self.name))
        if evidence.has_positions:
            return by_rows(self._values, evidence, self.needs.features)
        state = {}
        for key, value in self.state.items():
            state[key] = _beside(value, evidence.given_logits)
        return self.score(self.measure(evidence), state)

    def _dry_run(self) -> None:
        _dry_run(self.name, self.look)
        _dry_run(self.name, self.contribution)

    @property
    def fit_needs(self) -> Needs:
        """The evidence that the fit requires."""
        return needs_of([self.contribution])

    def look(self, evidence: Evidence) -> None:
        """Request all evidence that scoring needs, for the dry run; needs no state."""
        self.measure(evidence)

    def contribution(self, evidence: Evidence, keys: Tensor | None = None) -> Tensors:
        """Return one batch's contribution to the fit; ``keys`` ``(N,)`` determine the order of the rows."""
        contribution, with_rows = {}, False
        for key, value in self.accumulate(evidence, self.measure(evidence)).items():
            with_rows = with_rows or is_rows(key)
            contribution[key] = value.detach().cpu() if is_rows(key) else value.detach()
        if keys is not None and with_rows:
            contribution[KEY] = keys.cpu()
        return contribution

    def fitted(self: F, total: Tensors, model: str, head: str | None = None) -> F:
        """Return the score with the state computed from the total of all contributions.

        Args:
            total: The total of :meth:`contribution` over all batches.
            model: The fingerprint of the model.
            head: The name of the head.
        """
        with gradients_enabled():
            ordered = {key: value.clone() for key, value in sampled(total).items() if key != KEY}
            finished = self.finish(ordered)
        state = {key: value.detach().cpu().contiguous() for key, value in finished.items()}
        return self.with_state(state, model, head)

    def with_state(self: F, state: Tensors | None, model: str | None, head: str | None) -> F:
        """Return the score with another state."""
        copied = copy.copy(self)
        copied.state, copied.model, copied.head = state, model, head
        return copied


def _fields(cls: type[FittedScore]) -> dict[str, inspect.Parameter]:
    """Return the arguments that a class and its bases declare: annotated names with defaults."""
    inherited: Mapping[str, inspect.Parameter] = getattr(
        cls.__mro__[1], "__signature__", inspect.Signature()
    ).parameters
    fields = dict(inherited)
    for key, annotation in inspect.get_annotations(cls).items():
        if "ClassVar" in str(annotation):
            continue
        if key in RESERVED or key in METHODS:
            raise TypeError(f"the fitted score {cls.__name__!r} cannot have an argument {key!r}: the name is taken")
        if key not in cls.__dict__:
            raise TypeError(f"the argument {key!r} of the fitted score {cls.__name__!r} needs a default value")
        fields[key] = inspect.Parameter(
            key, inspect.Parameter.KEYWORD_ONLY, default=cls.__dict__[key], annotation=annotation
        )
    return fields


def _lacking(cls: type[FittedScore], method: str) -> str:
    return f"the fitted score {cls.__name__!r} has no method {method!r}; it needs {', '.join(METHODS)}"


def fitted_scores(scores: Iterable[Score]) -> list[FittedScore]:
    """Return the scores that need a fit."""
    return [score for score in scores if isinstance(score, FittedScore)]


def averaged(score: Score) -> Score:
    """Return the score that is averaged over views; for any other score, the score itself."""
    inner: Score = getattr(score, "inner", score)
    return inner


def plain_scores(scores: Iterable[Score]) -> list[Score]:
    """Return the scores that need no fit."""
    return [score for score in scores if not isinstance(score, FittedScore)]


def not_fitted(name: str) -> str:
    """Return the error message for a fitted score without a state."""
    return (
        f"the score {name!r} is not fitted: call GradientMetrics.fit(trainer, model, dataloader) first, pass "
        "GradientMetrics(fit_on='train') or fitted=FOLDER, or use lightning_gradmetrics.fit without a Trainer"
    )


def _beside(value: Tensor, other: Tensor) -> Tensor:
    """Move a value to another tensor's device, in the precision of its accumulators."""
    if value.is_floating_point():
        return value.to(other.device, accumulator(other))
    return value.to(other.device)
