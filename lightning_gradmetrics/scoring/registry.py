"""The registry of scores: registers them, and makes scores from names, functions, mappings and configurations."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, get_args, overload

from torch import Tensor

from lightning_gradmetrics.classifier.hints import did_you_mean
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.fitted import METHODS, FittedScore
from lightning_gradmetrics.scoring.recipes import RECIPES, Family, Recipe, Score

__all__ = [
    "RECIPES",
    "Family",
    "Recipe",
    "Score",
    "ScoreLike",
    "add_recipe",
    "make",
    "register",
    "resolve",
]

BUILT_IN = "lightning_gradmetrics.scores"
"""The package whose import registers the built-in scores; imported by name, because it imports this module."""

OF_ANSWERS = {
    "semgrad": "lightning_gradmetrics.language.semantic_gradients.semgrad",
    "hybridgrad": "lightning_gradmetrics.language.semantic_gradients.hybridgrad",
}
"""Scores of texts, which are not registered, because no other sample has them; imported by name when they are used."""

P = ParamSpec("P")
F = TypeVar("F", bound=type[FittedScore])


class ScoreFunction(Protocol):
    """A function of the evidence, or a function or class that makes a score."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the uncertainties, or a :class:`Score`."""
        ...


ScoreLike = str | Score | Mapping[str, Any] | ScoreFunction
"""A score: a name, such as ``"gradnorm"`` or ``"gradnorm(temperature=2)"``; a :class:`Score`; a function of the evidence; or a
mapping, as ``{"gradnorm": {"temperature": 2}}`` or with ``class_path`` and ``init_args``."""


class Decorator(Protocol):
    """What :func:`register` returns: it decorates a function of the evidence, or a subclass of :class:`FittedScore`."""

    @overload
    def __call__(self, method: F) -> F: ...

    @overload
    def __call__(self, method: Callable[Concatenate[Evidence, P], Tensor]) -> Callable[P, Score]: ...


def register(family: Family, paper: str, *, alias_of: str | None = None) -> Decorator:
    """Register a function of the evidence, or a subclass of :class:`FittedScore`, as the score of its name.

    A decorated function's name then makes the score: ``my_score(temperature=2)`` returns a :class:`Score`. The function's
    arguments are keyword-only and have defaults; their annotations are checked
    (:mod:`lightning_gradmetrics.scoring.arguments`). The first line of the docstring begins with "Negative" or
    "One minus" if the paper's quantity is a confidence. A decorated class is unchanged.

    Args:
        family: ``"baseline"`` for scores of the logits and the features, ``"gradient"`` for scores of gradients.
        paper: The paper that proposed the score, or another source.
        alias_of: The name of another score that equals this one at its default arguments; tables then show only that one.

    Returns:
        A decorator. A decorated function becomes one that makes the score; a class is returned unchanged.

    Raises:
        ValueError: If the family is unknown, or the name belongs to another score.
        TypeError: If an argument of the function is positional or has no default, if a class is not a subclass of
            :class:`FittedScore` or lacks one of its four methods, or if it is neither or has no name.

    Example:
        >>> @register("baseline", "this example")
        ... def logit_range(evidence: Evidence) -> Tensor:
        ...     "Negative range of the logits, ``min_c z_c - max_c z_c``."
        ...     return evidence.logits.amin(1) - evidence.logits.amax(1)
        >>> make("logit_range"), RECIPES.pop("logit_range").family
        (logit_range, 'baseline')
        >>> @register("baseline", "this example")
        ... class energy_above_mean(FittedScore):
        ...     "Energy minus its mean over in-distribution data."
        ...     def measure(self, evidence):
        ...         return {"energy": -evidence.logits.logsumexp(1)}
        ...     def accumulate(self, evidence, measured):
        ...         return {"sum": measured["energy"].sum(), "count": measured["energy"].new_tensor(len(measured["energy"]))}
        ...     def finish(self, total):
        ...         return {"mean": total["sum"] / total["count"]}
        ...     def score(self, measured, state):
        ...         return measured["energy"] - state["mean"]
        >>> make("energy_above_mean"), RECIPES.pop("energy_above_mean").family
        (energy_above_mean, 'baseline')
    """
    _check_family(family)

    def decorate(method: Any) -> Any:
        if not str(getattr(method, "__name__", "")).isidentifier():
            raise TypeError(f"only a function or a class with a name can be registered as a score, got {method!r}")
        recipe = Recipe(method.__name__, method, family, paper, alias_of)
        if not isinstance(method, type):
            _check_signature(recipe.name, method)
            add_recipe(recipe)
            return factory(recipe)
        _check_methods(method)
        add_recipe(recipe)
        method.recipe = recipe  # type: ignore[attr-defined]
        return method

    return decorate


def _check_methods(cls: type) -> None:
    """Refuse a class that is not a fitted score or lacks one of its four methods."""
    if not issubclass(cls, FittedScore):
        raise TypeError(f"{cls.__name__!r} must be a subclass of FittedScore to be a fitted score")
    lacking = [method for method in METHODS if getattr(cls, method) is getattr(FittedScore, method)]
    if lacking:
        raise TypeError(f"the fitted score {cls.__name__!r} lacks {', '.join(lacking)}; it needs {', '.join(METHODS)}")


def _check_signature(name: str, function: Callable[..., Any]) -> None:
    """Refuse arguments after the evidence that are not keyword-only or have no default."""
    _, *others = inspect.signature(function).parameters.values()
    for parameter in others:
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
            raise TypeError(
                f"the argument {parameter.name!r} of the score {name!r} must be keyword-only and have a default, as in "
                f"def {name}(evidence, *, {parameter.name}=1.0)"
            )


def factory(recipe: Recipe) -> Callable[..., Score]:
    """Return a function that makes scores from a recipe, with the recipe's docstring and signature."""

    @functools.wraps(recipe.method)
    def make_score(*, name: str | None = None, **arguments: Any) -> Score:
        return recipe(name=name, **arguments)

    annotations: dict[str, Any] = {"return": Score}
    make_score.__signature__ = recipe.signature  # type: ignore[attr-defined]
    for key, parameter in recipe.signature.parameters.items():
        annotations[key] = parameter.annotation
    make_score.__annotations__ = annotations
    make_score.recipe = recipe  # type: ignore[attr-defined]
    return make_score


def _check_family(family: str) -> None:
    if family not in get_args(Family):
        allowed = get_args(Family)
        hint = did_you_mean(family, allowed)
        raise ValueError(f"unknown family {family!r} of a score;{hint} available: {', '.join(allowed)}")


def add_recipe(recipe: Recipe) -> None:
    """Add a recipe; a reloaded module or a notebook cell that runs again replaces its earlier recipe."""
    importlib.import_module(BUILT_IN)
    existing = RECIPES.get(recipe.name)
    if existing is not None and existing.method.__module__ != recipe.method.__module__:
        raise ValueError(
            f"the score name {recipe.name!r} is taken by {existing.method.__module__}: give the score in "
            f"{recipe.method.__module__} another name"
        )
    RECIPES[recipe.name] = recipe


# Scores from user input


def make(score: ScoreLike, *, name: str | None = None, **arguments: Any) -> Score:
    """Return a score from its name, from ``"name(argument=value)"``, or from any other :data:`ScoreLike`.

    Args:
        score: The score. A name with dots, such as ``"my_package.my_score"``, is imported.
        name: Another name for it.
        **arguments: Its arguments, if they are not in ``score``.

    Returns:
        The score.

    Raises:
        ValueError: If the name is unknown (the message lists similar names), or an argument is not allowed.
        TypeError: If ``score`` is not a :data:`ScoreLike`, or an argument is unknown.

    Example:
        >>> make("gradnorm(temperature=2.0, target='all')"), make({"energy": {"temperature": 2}}), make("energy", name="mine")
        (gradnorm(temperature=2.0,target=all), energy(temperature=2), mine: energy)
    """
    made = _made(score, arguments)
    return made if name is None else made.named(name)


def _made(score: Any, arguments: Mapping[str, Any]) -> Score:
    if isinstance(score, Score):
        if arguments:
            raise TypeError(f"the score {score.name!r} is a Score object already and takes no further arguments")
        return score
    if isinstance(score, str):
        name, spelled = _parse(score)
        return _known(name)(**spelled, **arguments)
    if isinstance(score, Mapping):
        return _from_mapping(score, arguments)
    if isinstance(score, Recipe):
        return score(**arguments)
    if callable(score):
        return _recipe_of(score)(**arguments)
    raise TypeError(
        "a score is a name, such as 'gradnorm' or 'gradnorm(temperature=2)', a Score, a function of the evidence, or a mapping "
        f"{{'gradnorm': {{'temperature': 2}}}}; got {type(score).__name__}"
    )


def _recipe_of(function: Callable[..., Any], name: str | None = None) -> Recipe:
    """Return the recipe of a registered function, of the class of a fitted score, or of a plain function."""
    own = getattr(function, "recipe", None)
    if isinstance(own, Recipe):
        return own
    return Recipe.of(function, name)


def _known(name: str) -> Recipe:
    """Return the recipe of a name; a name with dots is imported."""
    importlib.import_module(BUILT_IN)
    if name in RECIPES:
        return RECIPES[name]
    if "." in name:
        return _recipe_of(_imported(name))
    if name in OF_ANSWERS:
        return _recipe_of(_imported(OF_ANSWERS[name]))
    hint = did_you_mean(name, [*RECIPES, *OF_ANSWERS])
    raise ValueError(f"unknown score {name!r};{hint} available: {', '.join(sorted(RECIPES))}")


def _imported(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    try:
        item = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import the score {path!r}: {error}") from error
    if not callable(item):
        raise ValueError(f"{path!r} is a {type(item).__name__}, not a score")
    return item  # type: ignore[no-any-return]


def _from_mapping(node: Mapping[str, Any], arguments: Mapping[str, Any]) -> Score:
    """Return a score from ``{name: arguments}``, or from a LightningCLI or Hydra node that is not instantiated yet."""
    if "class_path" in node:
        score_arguments = node.get("init_args") or node.get("dict_kwargs") or {}
        return _known(str(node["class_path"]))(**score_arguments, **arguments)
    if "_target_" in node:
        score_arguments = {}
        for key, value in node.items():
            if not (key.startswith("_") and key.endswith("_")):
                score_arguments[key] = value
        return _known(str(node["_target_"]))(**score_arguments, **arguments)
    if len(node) != 1:
        raise ValueError(
            f"a score given as a mapping has one key, its name, as in {{'gradnorm': {{'temperature': 2}}}}; got "
            f"{', '.join(map(repr, node)) or 'none'}"
        )
    ((name, score_arguments),) = node.items()
    return _known(name)(**(score_arguments or {}), **arguments)


def _named(name: str, value: Any) -> Score:
    """Return the score of an entry of a mapping: ``name: score``, or ``name: arguments`` for a score of that name."""
    if not isinstance(name, str):
        raise TypeError(f"scores= has the name {name!r}; expected a word for each score, as in {{'mine': 'energy'}}")
    is_node = isinstance(value, Mapping) and not {"class_path", "_target_"}.isdisjoint(value)
    is_other = isinstance(value, Mapping) and len(value) == 1 and next(iter(value)) in RECIPES
    if value is None or (isinstance(value, Mapping) and not is_node and not is_other):
        return _known(name)(name=name, **(value or {}))
    if callable(value) and not isinstance(value, Score):
        return _recipe_of(value, name)(name=name)
    return make(value, name=name)


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments in ``name`` or ``name(argument=value, ...)``; ``head`` and ``head.weight`` are texts."""
    name, bracket, rest = text.strip().partition("(")
    if not bracket:
        return name, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        return name.strip(), {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"cannot read the score {text!r}; write name(argument=value, ...), as in gradnorm(temperature=2.0), with quotes "
            "around texts, as in gradnorm(target='layer4.*')"
        ) from error


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return float("inf") if node.id == "inf" else node.id
    if isinstance(node, ast.Call | ast.Attribute):
        return ast.unparse(node)  # a score, as in views(score=gradnorm(p=2)), or a parameter, as in target=head.weight
    return ast.literal_eval(node)


def _check_names_differ(scores: Iterable[Score]) -> None:
    names: set[str] = set()
    for score in scores:
        if score.name in names:
            raise ValueError(f"two scores are called {score.name!r}: rename one, as in {{'mine': {score.name!r}}}")
        names.add(score.name)


def resolve(scores: ScoreLike | Iterable[ScoreLike] | Mapping[str, ScoreLike]) -> tuple[Score, ...]:
    """Return the scores of one or more names, or of a mapping that gives each its own name.

    Args:
        scores: One :data:`ScoreLike`, several, or a mapping from names to them.

    Returns:
        The scores, in the same order.

    Raises:
        ValueError: If there is none, or two scores have the same name.

    Example:
        >>> resolve(["energy", "gradnorm"]), resolve({"mine": "energy", "gradnorm": {"temperature": 2}})
        ((energy, gradnorm), (mine: energy, gradnorm: gradnorm(temperature=2)))
    """
    importlib.import_module(BUILT_IN)
    if isinstance(scores, Mapping) and {"class_path", "_target_"}.isdisjoint(scores):
        made = [_named(name, score) for name, score in scores.items()]
    elif isinstance(scores, (str, Score, Recipe, Mapping)) or callable(scores):
        made = [make(scores)]
    elif isinstance(scores, Iterable):
        made = [make(score) for score in scores]
    else:
        made = [make(scores)]  # raises
    _check_names_differ(made)
    if not made:
        raise ValueError(f"no score was given; available: {', '.join(sorted(RECIPES))}")
    return tuple(made)
