"""Scores, which map evidence to an uncertainty ``(N,)``, higher = more uncertain, and the recipes that make them."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor

from lightning_gradmetrics.scoring.arguments import annotations_of, check
from lightning_gradmetrics.scoring.dry_run import Needs, needs_of
from lightning_gradmetrics.scoring.evidence import Evidence, MissingEvidenceError
from lightning_gradmetrics.scoring.positions import by_rows, works_on_maps

__all__ = ["RECIPES", "Family", "Recipe", "Score"]

Family = Literal["baseline", "gradient"]

S = TypeVar("S", bound="Score")


class Score:
    """A named method with its arguments: a callable from evidence to uncertainties ``(N,)``, higher = more uncertain.

    Scores are created by the functions and classes in :mod:`lightning_gradmetrics.scores`, as in
    ``gradnorm(temperature=2)``.

    Args:
        name: The column in the results and the row in the tables.
        recipe: The registered method.
        arguments: Its keyword arguments.

    Raises:
        ValueError: If an argument has a value that is not allowed, or the method fails in its dry run.

    Example:
        >>> from lightning_gradmetrics.scores import energy
        >>> energy(temperature=2.0), energy().named("free energy")
        (energy(temperature=2.0), free energy: energy)
    """

    def __init__(self, name: str, recipe: Recipe, arguments: Mapping[str, Any]) -> None:
        self.name = name
        self.recipe = recipe
        self.arguments = dict(arguments)
        check(name, self.arguments, recipe.annotations)
        self._dry_run()

    def __call__(self, evidence: Evidence) -> Tensor:
        """Return the uncertainty of every sample, ``(N,)``, or of every position, ``(N, *P)``.

        Raises:
            ValueError: If the evidence lacks what the score requests, or the result has the wrong shape.
        """
        try:
            values = self._values(evidence)
        except MissingEvidenceError as error:
            raise ValueError(f"the score {self.name!r} {error}") from error
        _check_values(self.name, values, evidence.shape)
        return values

    def _values(self, evidence: Evidence) -> Tensor:
        if not evidence.has_positions or self.works_on_maps:
            return self._method(evidence)
        return by_rows(self._method, evidence, self.needs.features)

    def _method(self, evidence: Evidence) -> Tensor:
        values: Tensor = self.recipe.method(evidence, **self.arguments)
        return values

    @property
    def works_on_maps(self) -> bool:
        """Whether the score has the same values for maps ``(N, C, *P)`` as for the same positions as rows ``(M, C)``."""
        known = vars(self).get("_works_on_maps")
        if known is None:
            known = self._works_on_maps = works_on_maps(self._method)
        return bool(known)

    def _dry_run(self) -> None:
        _dry_run(self.name, self)

    @property
    def needs(self) -> Needs:
        """The evidence that the score needs. The dry run of a plain score has one result, which is stored."""
        if type(self) is not Score:
            return needs_of([self])
        known: Needs | None = vars(self).get("_needs")
        if known is None:
            known = self._needs = needs_of([self])
        return known

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle or to copy, without the result of the dry run, which may contain any callable."""
        return {name: value for name, value in vars(self).items() if name != "_needs"}

    def named(self: S, name: str) -> S:
        """Return the same score under another name."""
        copied = copy.copy(self)
        copied.name = name
        return copied

    def __repr__(self) -> str:
        spelled = self.recipe.name_of(self.arguments)
        return spelled if spelled == self.name else f"{self.name}: {spelled}"


@dataclass(frozen=True)
class Recipe:
    """The method of a score with its name and paper. Calling it with arguments returns a :class:`Score`.

    Args:
        name: The score's name.
        method: The function from evidence and keyword arguments to ``(N,)``, or the class of a fitted score.
        family: ``"baseline"`` or ``"gradient"``.
        paper: The paper that proposed the score.
        alias_of: The name of another score that equals this one at its default arguments.

    Example:
        >>> from lightning_gradmetrics import scores  # registers the built-in scores
        >>> from lightning_gradmetrics.scoring.registry import RECIPES
        >>> RECIPES["energy"].defaults, RECIPES["energy"].paper, RECIPES["energy"](temperature=2.0)
        ({'temperature': 1.0}, 'Liu et al. 2020, arXiv:2010.03759', energy(temperature=2.0))
    """

    name: str
    method: Callable[..., Any]
    family: Family
    paper: str
    alias_of: str | None = None

    @classmethod
    def of(cls, function: Callable[..., Any], name: str | None = None) -> Recipe:
        """Return the recipe of a function that is not registered; its family follows from its dry run.

        Raises:
            ValueError: If the function has no name, or fails in its dry run.
        """
        inner = getattr(function, "func", function)  # of a functools.partial
        name = name or str(getattr(inner, "__name__", type(inner).__name__))
        if name == "<lambda>":
            raise ValueError("a lambda given as a score has no name: give it one, as in scores={'mine': lambda ...}")
        needs = _dry_run(name, function)
        return cls(name, function, "gradient" if needs.backward or needs.head_gradient else "baseline", "")

    @property
    def documentation(self) -> str:
        """The method's docstring; its first line begins with "Negative" if the paper's quantity is a confidence."""
        return inspect.getdoc(self.method) or ""

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return self.documentation.partition("\n")[0]

    @property
    def signature(self) -> inspect.Signature:
        """The arguments of the score: keyword-only, with annotations and defaults."""
        types = annotations_of(self.method, plain=True)
        keywords = []
        for key, parameter in inspect.signature(self.method).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                keywords.append(parameter.replace(annotation=types.get(key, parameter.annotation)))
        return inspect.Signature(keywords, return_annotation=Score)

    @property
    def defaults(self) -> dict[str, Any]:
        """The arguments with their default values."""
        parameters = inspect.signature(self.method).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @property
    def annotations(self) -> dict[str, Any]:
        """The arguments' resolved annotations."""
        return annotations_of(self.method)

    def described(self) -> Score:
        """Return the score with its default arguments, for tables, even if packages that it needs are missing."""
        return self()

    def name_of(self, arguments: Mapping[str, Any]) -> str:
        """Return the score's name with the arguments that differ from the defaults."""
        defaults, changed = self.defaults, []
        for key, value in arguments.items():
            if value != defaults.get(key):
                changed.append(f"{key}={_shown(value)}")
        return f"{self.name}({','.join(changed)})" if changed else self.name

    def check_names(self, arguments: Mapping[str, Any]) -> None:
        """Refuse arguments that the score does not have.

        Raises:
            TypeError: If an argument is unknown.
        """
        defaults = self.defaults
        for key in arguments:
            if key not in defaults:
                allowed = ", ".join(f"{name}={value!r}" for name, value in defaults.items()) or "none"
                raise TypeError(f"score {self.name!r} has no argument {key!r}; its arguments are: {allowed}")

    def __call__(self, *, name: str | None = None, **arguments: Any) -> Score:
        """Return the score with these arguments.

        Raises:
            TypeError: If an argument is unknown.
            ValueError: If an argument has a value that is not allowed.
        """
        if isinstance(self.method, type):
            made: Score = self.method(name=name, **arguments)
            return made
        self.check_names(arguments)
        return Score(name or self.name_of(arguments), self, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by name, so that scores can be sent to spawned processes."""
        if RECIPES.get(self.name) is self:
            return _registered, (self.method.__module__, self.name)
        return _unregistered, (self.method, self.name)


RECIPES: dict[str, Recipe] = {}
"""All registered scores by name."""


def _registered(module: str, name: str) -> Recipe:
    """Return the recipe of that name, which its module registers when it is imported."""
    importlib.import_module(module)
    return RECIPES[name]


def _unregistered(method: Callable[..., Any], name: str) -> Recipe:
    own = getattr(method, "recipe", None)
    return own if isinstance(own, Recipe) else Recipe.of(method, name)


def _shown(value: Any) -> str:
    """Return an argument as text that ``make`` can parse: identifiers without quotes, other strings in quotes."""
    if isinstance(value, str):
        return value if value.isidentifier() else repr(value)
    return str(getattr(value, "__name__", value))


def _check_values(name: str, values: Any, shape: tuple[int, ...]) -> None:
    """Refuse results that are not one number per sample, or per position."""
    unit = "sample" if len(shape) == 1 else "position"
    if not isinstance(values, Tensor):
        raise ValueError(f"the score {name!r} returned {type(values).__name__}; it must return a tensor of shape (N,)")
    if values.shape != shape:
        raise ValueError(
            f"the score {name!r} returned shape {tuple(values.shape)} for {shape[0]} samples; it must return one number per "
            f"{unit}, shape {shape}"
        )


def _dry_run(name: str, function: Callable[[Evidence], Any]) -> Needs:
    """Call a score on synthetic samples to find mistakes before a run."""
    try:
        return needs_of([function])
    except MissingEvidenceError as error:
        raise ValueError(f"the score {name!r} {error}") from error
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"the score {name!r} fails in its dry run on two synthetic samples with 3 classes "
            f"({type(error).__name__}: {error}); a score is a function of one Evidence, for any number of classes"
        ) from error
