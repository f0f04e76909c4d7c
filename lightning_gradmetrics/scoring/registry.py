"""The registry of scores: named recipes from evidence to an uncertainty ``(N,)``, higher = more uncertain."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from lightning_gradmetrics.scoring.evidence import Evidence, Needs, needs_of

__all__ = ["RECIPES", "Family", "Recipe", "Score", "ScoreLike", "make", "register", "resolve"]

Family = Literal["baseline", "gradient"]


@dataclass(frozen=True)
class Score:
    """A recipe with its arguments: a callable from evidence to uncertainties ``(N,)``.

    Args:
        name: The column in the results and the row in the tables.
        recipe: What it was made of.
        arguments: Its keyword arguments.
    """

    name: str
    recipe: Recipe
    arguments: Mapping[str, Any]

    def __call__(self, evidence: Evidence) -> Tensor:
        """Uncertainty of every sample, ``(N,)``."""
        return self.recipe.function(evidence, **self.arguments)

    @property
    def needs(self) -> Needs:
        """What it looks at."""
        return needs_of([self])

    def named(self, name: str) -> Score:
        """The same score under another name."""
        return replace(self, name=name)


@dataclass(frozen=True)
class Recipe:
    """A registered score function. Calling it with arguments makes a :class:`Score`.

    Args:
        name: Its name.
        function: From evidence, and keyword arguments, to uncertainties ``(N,)``.
        family: ``"baseline"`` looks at logits only and takes no gradient; ``"gradient"`` is a gradient score.
        paper: Where it comes from.
    """

    name: str
    function: Callable[..., Tensor]
    family: Family
    paper: str

    @property
    def documentation(self) -> str:
        """Its docstring; its first line begins with "Negative" where the paper's quantity is a confidence."""
        return inspect.getdoc(self.function) or ""

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return self.documentation.partition("\n")[0]

    @property
    def defaults(self) -> dict[str, Any]:
        """Its arguments with their default values."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def described(self) -> Score:
        """The score with its default arguments, for the tables: to be looked at, not run."""
        return self()

    def __call__(self, *, name: str | None = None, **arguments: Any) -> Score:
        """The score with these arguments.

        Raises:
            TypeError: If an argument is unknown.
        """
        unknown = [key for key in arguments if key not in self.defaults]
        if unknown:
            allowed = ", ".join(f"{k}={v!r}" for k, v in self.defaults.items()) or "none"
            raise TypeError(f"score {self.name!r} has no argument {unknown[0]!r}; its arguments are: {allowed}")
        changed = {key: value for key, value in arguments.items() if value != self.defaults[key]}
        shown = ",".join(f"{key}={_shown(value)}" for key, value in changed.items())
        return Score(name or (f"{self.name}({shown})" if shown else self.name), self, arguments)


def _shown(value: Any) -> str:
    """An argument in a score's name, so that :func:`make` reads it back: words stand bare, other text in quotes."""
    if isinstance(value, str):
        return value if value.isidentifier() else repr(value)
    return str(getattr(value, "__name__", value))


RECIPES: dict[str, Recipe] = {}
"""All registered scores by name."""

ScoreLike = str | Score | Recipe


def register(family: Family, paper: str) -> Callable[[Callable[..., Tensor]], Recipe]:
    """Register a function as the score of its name.

    Args:
        family: ``"baseline"`` or ``"gradient"``.
        paper: Where the score comes from.
    """

    def decorate(function: Callable[..., Tensor]) -> Recipe:
        recipe = Recipe(function.__name__, function, family, paper)
        RECIPES[recipe.name] = recipe
        return recipe

    return decorate


def make(score: ScoreLike, **arguments: Any) -> Score:
    """A score of its name, of ``"name(argument=value)"``, or of one already made.

    Raises:
        ValueError: If the name is unknown; the nearest names are in the message.

    Example:
        >>> make("gradnorm(temperature=2.0, target='all')").name
        'gradnorm(temperature=2.0,target=all)'
    """
    if isinstance(score, Score):
        return score
    if isinstance(score, Recipe):
        return score(**arguments)
    if not isinstance(score, str):
        raise TypeError(
            f"a score is a name, as 'gradnorm' or 'gradnorm(temperature=2)', or a Score; got {type(score).__name__}"
        )
    name, given = _parse(score)
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 3, 0.5)
        hint = f" did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"unknown score {name!r};{hint} available: {', '.join(sorted(RECIPES))}")
    return RECIPES[name](**given, **arguments)


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments in ``name`` or ``name(argument=value, ...)``; bare words are strings."""
    name, bracket, rest = text.strip().partition("(")
    if not bracket:
        return name, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        return name.strip(), {str(k.arg): _value(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"cannot read the score {text!r}; write name(argument=value, ...), as in gradnorm(temperature=2.0)"
        ) from error


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return float("inf") if node.id == "inf" else node.id
    return ast.literal_eval(node)


def resolve(scores: ScoreLike | Iterable[ScoreLike] | Mapping[str, ScoreLike]) -> tuple[Score, ...]:
    """The scores of one or more names, or of a mapping that gives each its own name.

    Raises:
        ValueError: If there is none, or a name stands twice.
    """
    if isinstance(scores, (str, Score, Recipe)):
        scores = [scores]
    made = [make(s).named(n) for n, s in scores.items()] if isinstance(scores, Mapping) else [make(s) for s in scores]
    names = [score.name for score in made]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ValueError(
            f"the score name {double[0]!r} stands twice; give one another name, as in make('gradnorm', name='mine')"
        )
    if not made:
        raise ValueError(f"no score was given; available: {', '.join(sorted(RECIPES))}")
    return tuple(made)
