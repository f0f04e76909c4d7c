"""What every registered score is, needs and costs: for ``gradmetrics scores``, and for the table in the documentation.

``python -m lightning_gradmetrics.cli.score_catalogue`` prints ``docs/scores.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_gradmetrics.scores import RECIPES, FittedScore, Recipe, Score
from lightning_gradmetrics.scoring.evidence import Needs, needs_of

__all__ = ["Line", "lines", "markdown"]


INTRODUCTION = (
    "This page is made by `python -m lightning_gradmetrics.cli.score_catalogue > docs/scores.md`; `gradmetrics scores` shows "
    "the table.",
    "Every score is an uncertainty: higher = more uncertain. Where the paper's quantity is a confidence, the last "
    "column says how to get it back. *Free with the forward* means that the forward which runs anyway gives all it "
    "needs. All scores that need more share one forward of their own, and those of one objective share its backward. C "
    "is the number of classes.",
    "A score that needs a fit is fitted once, on data that are neither trained on nor scored, and its state is kept as "
    "tensors (safetensors). A state is refused by any other model, head or setting.",
    """```python
callback = lgm.GradientMetrics(["max_softmax", "oberdiek", "confounding_detector"])
trainer = Trainer(callbacks=[callback])
callback.fit(trainer, model, [held_out, others], datasets={"held_out": "id", "others": "far"})
trainer.test(model, loaders)
lgm.scores.save_fitted(callback.scorer.scores, "fitted")                 # and load_fitted(scores, "fitted", model)
scores = lgm.fit(model, batches, ["oberdiek"])                           # without a Trainer
```""",
    "The command does it by itself, on `data.fit`, `data.fit_outside` or else `data.train`; `fitted=FOLDER` takes states that "
    "an earlier run kept. Fitting a detector of errors on the very samples a model was trained on finds few errors.",
)


@dataclass(frozen=True)
class Line:
    """A score's line in the tables, in words.

    Args:
        name: Its name.
        arguments: Its arguments with their defaults.
        summary: What it is.
        text: The rest of its documentation.
        paper: Where it comes from.
        needs: What it looks at.
        cost: What it costs beside the forward that runs anyway.
        sign: How the paper's quantity follows from the score.
    """

    name: str
    arguments: str
    summary: str
    text: str
    paper: str
    needs: str
    cost: str
    sign: str


def lines() -> list[Line]:
    """All registered scores, the baselines first."""
    return [_line(recipe) for recipe in sorted(RECIPES.values(), key=lambda r: (r.family, r.name))]


def _line(recipe: Recipe) -> Line:
    summary, _, text = recipe.documentation.partition("\n")
    return Line(
        name=recipe.name,
        arguments=", ".join(f"{key}={value!r}" for key, value in recipe.defaults.items()),
        summary=summary,
        text=text.strip(),
        paper=recipe.paper,
        needs=", ".join(_needs(recipe.described())),
        cost=_cost(recipe),
        sign=_sign(summary),
    )


def _needs(score: Score) -> list[str]:
    """In words, for the default arguments."""
    needs = score.needs
    forward = bool(needs.probes) and not needs.backward
    found = {"head": needs.features, "labels": needs.labels, "forward": forward, "backward": needs.backward}
    words = [word for word, needed in found.items() if needed]
    return [*(words if set(words) - {"labels"} else ["logits", *words]), *_fit(score)]


def _fit(score: Score) -> list[str]:
    if not isinstance(score, FittedScore):
        return []
    needs = score.fit_needs
    if needs.outside:
        return ["fit (in- and out-of-distribution data)"]
    return ["fit (labels)" if needs.labels else "fit"]


def _cost(recipe: Recipe) -> str:
    """What one batch costs, with the default arguments and, where that differs, over all parameters."""
    score = recipe.described()
    cost = _passes(score)
    if recipe.defaults.get("target") == "head":
        cost += f"; target='all': {_passes(recipe(target='all'))}"
    return f"fitted once, then {cost}" if isinstance(score, FittedScore) else cost


def _passes(score: Score) -> str:
    few, many = (_objectives(_dry_run(score, classes)) for classes in (3, 4))
    parts = []
    if few:
        count = "C backwards" if many > few else f"{few} backward{'s' * (few > 1)}"
        parts.append(f"one forward and {count}")
    if _dry_run(score, 3).probes:
        parts.append("passes of its own")
    return " and ".join(parts) or "free with the forward"


def _dry_run(score: Score, classes: int) -> Needs:
    return needs_of([score], classes)


def _objectives(needs: Needs) -> int:
    return len({objective for objectives in needs.gradients.values() for objective in objectives})


def _sign(summary: str) -> str:
    """The paper's quantity: a summary begins with "Negative" or "One minus" where that is a confidence."""
    if summary.startswith("Negative"):
        return "-score"
    return "1 - score" if summary.startswith("One minus") else "score"


def markdown() -> str:
    """The documentation's page of scores."""
    rows = [
        [f"[`{x.name}`](#{x.name})", _plain(x.summary).replace("|", "\\|"), x.paper, x.needs, x.cost, x.sign]
        for x in lines()
    ]
    head = ["score", "what it is", "paper", "needs", "cost", "paper's quantity"]
    table = [head, ["---"] * len(head), *rows]
    parts = [
        "# Scores",
        *INTRODUCTION,
        "\n".join(f"| {' | '.join(row)} |" for row in table),
        *(_section(line) for line in lines()),
    ]
    return "\n\n".join(parts) + "\n"


def _section(line: Line) -> str:
    arguments = f"Arguments: `{line.arguments}`." if line.arguments else ""
    source = f"{line.paper}. Set it in `conf/score/{line.name}.yaml`."
    parts = [f"## {line.name}", _plain(line.summary), _plain(line.text), arguments, source]
    return "\n\n".join(part for part in parts if part)


def _plain(text: str) -> str:
    return text.replace("``", "`")


def main() -> None:
    """Print the page."""
    print(markdown(), end="")


if __name__ == "__main__":
    main()
