"""Describes every registered score, its needs and its cost, for ``gradmetrics scores`` and the documentation.

``python -m lightning_gradmetrics.cli.score_catalogue`` writes ``docs/scores.md`` and the stub ``scores/__init__.pyi``.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from lightning_gradmetrics import scores as package
from lightning_gradmetrics.scores import FittedScore, Score
from lightning_gradmetrics.scoring.dry_run import Needs, needs_of
from lightning_gradmetrics.scoring.registry import RECIPES, Recipe

__all__ = ["Line", "lines", "markdown", "stub"]

INTRODUCTION = (
    "Look up here what a score computes, what it needs and costs, and its paper. `gradmetrics scores` prints the table.",
    "Every score is an uncertainty: higher = more uncertain. If the paper defines a confidence, the last column shows how "
    "to convert. *Free* means that the score needs nothing beyond the forward pass that runs anyway. All other "
    "scores share one extra forward pass, and those of one objective share its backward pass. C is the number of classes.",
    "Fitted scores need a fit before they can score, on data used for neither training nor evaluation. The state is stored "
    "as tensors (safetensors) and can only be loaded for the same model, head and arguments.",
    """```python
callback = lgm.GradientMetrics(["max_softmax", "oberdiek", "confounding_detector"])
trainer = Trainer(callbacks=[callback])
callback.fit(trainer, model, [held_out, others], datasets={"held_out": "id", "others": "far"})
trainer.test(model, loaders)

fitted = lgm.fit(model, batches, ["oberdiek"])  # without a Trainer
lgm.scores.save_fitted(fitted, "folder")  # for GradientMetrics(fitted="folder")
fitted = lgm.scores.load_fitted(["oberdiek"], "folder", model)
```""",
    "The command fits them automatically, on `data.fit` and `data.fit_ood`, or on `data.train` if those are not set; "
    "`fitted_folder=FOLDER` loads the states of an earlier run. A detector of errors that is fitted on the model's training "
    "samples sees few errors.",
    "A score is given by its name, as `gradnorm`; with arguments, as `gradnorm(temperature=2, target=all)` or "
    "`{gradnorm: {temperature: 2}}`; as an object, as `lgm.scores.gradnorm(temperature=2)`; or as a function of the evidence.",
    "`python -m lightning_gradmetrics.cli.score_catalogue` generates this page from the docstrings.",
)

SECTIONS = ("Args", "Returns", "Attributes", "Raises", "Example", "Reference")
SECTION = re.compile(rf"^({'|'.join(SECTIONS)}):$", re.MULTILINE)
ARGUMENT = re.compile(r"^(\**\w+): ", re.MULTILINE)


@dataclass(frozen=True)
class Line:
    """The texts of a score's row in the tables.

    Args:
        name: The name.
        arguments: The arguments with their defaults.
        summary: The first line of the documentation.
        paper: The paper or other source.
        needs: The evidence that it needs.
        cost: The cost in addition to the forward pass of the prediction.
        sign: The paper's quantity as a function of the score.
        aliases: Other names of the score.
    """

    name: str
    arguments: str
    summary: str
    paper: str
    needs: str
    cost: str
    sign: str
    aliases: str


def lines() -> list[Line]:
    """Return all registered scores except aliases, the baselines first."""
    return [_line(recipe) for recipe in _sorted() if recipe.alias_of is None]


def _sorted() -> list[Recipe]:
    return sorted(RECIPES.values(), key=lambda recipe: (recipe.family, recipe.name))


def _line(recipe: Recipe) -> Line:
    return Line(
        name=recipe.name,
        arguments=_arguments(recipe),
        summary=recipe.summary,
        paper=recipe.paper,
        needs=", ".join(_needs(recipe.described())),
        cost=_cost(recipe),
        sign=_sign(recipe.summary),
        aliases=", ".join(other.name for other in _sorted() if other.alias_of == recipe.name),
    )


def _arguments(recipe: Recipe) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in recipe.defaults.items())


def _needs(score: Score) -> list[str]:
    """Return the needs of a score as phrases."""
    needs = score.needs
    needed = {
        "head": needs.features,
        "labels": needs.labels,
        "layers": bool(needs.observable),
        "forward": bool(needs.reruns) and not needs.backward,
        "backward": needs.backward,
    }
    words = []
    for word, is_needed in needed.items():
        if is_needed:
            words.append(word)
    if not set(words) - {"labels"}:
        words = ["logits", *words]
    return [*words, *_fit(score)]


def _fit(score: Score) -> list[str]:
    if not isinstance(score, FittedScore):
        return []
    needs = score.fit_needs
    if needs.ood:
        return ["fit (in- and out-of-distribution data)"]
    return ["fit (labels)" if needs.labels else "fit"]


def _cost(recipe: Recipe) -> str:
    """Return the cost of one batch with the default arguments and, if different, over all parameters."""
    score = recipe.described()
    cost = _passes(score)
    if recipe.defaults.get("target") == "head":
        cost += f"; target='all': {_passes(recipe(target='all'))}"
    return f"fitted once, then {cost}" if isinstance(score, FittedScore) else cost


def _passes(score: Score) -> str:
    with_three, with_four = _objectives(needs_of([score], 3)), _objectives(needs_of([score], 4))
    parts = []
    if with_three:
        count = "C backwards" if with_four > with_three else f"{with_three} backward{'s' * (with_three > 1)}"
        parts.append(f"one forward and {count}")
    if needs_of([score]).reruns:
        parts.append("separate passes")
    return " and ".join(parts) or "free"


def _objectives(needs: Needs) -> int:
    objectives = set()
    for requests in needs.gradients.values():
        objectives |= set(requests)
    return len(objectives)


def _sign(summary: str) -> str:
    """Return the paper's quantity; a summary that begins with "Negative" or "One minus" marks a confidence."""
    if summary.startswith("Negative"):
        return "-score"
    return "1 - score" if summary.startswith("One minus") else "score"


# The page


def markdown() -> str:
    """Return the documentation page of all scores."""
    head = ["score", "what it is", "paper", "needs", "cost", "paper's quantity"]
    table = [head, ["---"] * len(head)]
    for line in lines():
        name = f"[`{line.name}`](#{line.name})" + (f", also `{line.aliases}`" if line.aliases else "")
        summary = _plain(line.summary).replace("|", "\\|")
        table.append([name, summary, line.paper, line.needs, line.cost, line.sign])
    rows = [f"| {' | '.join(row)} |" for row in table]
    sections = map(_section, _sorted())
    return "\n\n".join(["# Scores", *INTRODUCTION, "\n".join(rows), *sections]) + "\n"


def _section(recipe: Recipe) -> str:
    text, *rest = SECTION.split(recipe.documentation)
    content = {}
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        content[title] = textwrap.dedent(body.strip("\n"))
    parts = [f"## {recipe.name}", _plain(text.strip())]
    if recipe.alias_of:
        parts.append(f"With its defaults this is [`{recipe.alias_of}`](#{recipe.alias_of}).")
    if "Args" in content:
        parts.append(f"Arguments: `{_arguments(recipe)}`.\n\n{_items(content['Args'])}")
    if "Returns" in content:
        parts.append(_plain(content["Returns"].strip()))
    if "Example" in content:
        parts.append(f"```python\n{content['Example'].strip()}\n```")
    parts.append(
        f"{_plain(content.get('Reference', recipe.paper).strip())}. Set it in `conf/score/{recipe.name}.yaml`."
    )
    return "\n\n".join(parts)


def _items(arguments: str) -> str:
    """Return the section of arguments as a Markdown list."""
    return _plain(ARGUMENT.sub(r"- `\1`: ", arguments)).strip().replace("\n    ", "\n  ")


def _plain(text: str) -> str:
    return text.replace("``", "`")


# The stub


def stub() -> str:
    """Return the stub of the package of scores, which lists the discovered names for type checkers and editors."""
    imports = []
    for name in package.__all__:
        home = RECIPES[name].method.__module__ if name in package.NAMES else _home(name)
        imports.append(f"from {home} import {name} as {name}")
    header = ["# Generated by python -m lightning_gradmetrics.cli.score_catalogue", "# ruff: noqa"]
    return "\n".join([*header, *sorted(imports), "", "__all__: list[str]", "NAMES: tuple[str, ...]"]) + "\n"


def _home(name: str) -> str:
    """Return the module that defines a public name of the package."""
    home = getattr(getattr(package, name), "__module__", "")
    return home if home.startswith("lightning_gradmetrics") else "lightning_gradmetrics.scoring.registry"


def main() -> None:
    """Write the page and the stub to the source checkout."""
    root = Path(__file__).parents[2]
    (root / "docs" / "scores.md").write_text(markdown(), encoding="utf-8")
    (Path(package.__file__).parent / "__init__.pyi").write_text(stub(), encoding="utf-8")


if __name__ == "__main__":
    main()
