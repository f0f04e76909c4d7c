"""Scores averaged over augmented views of the input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.scores.view_probes import (
    ViewMeans,
    ViewOutputs,
    Views,
    ViewSet,
    reads_outputs,
    view_evidence,
)
from lightning_gradmetrics.scoring.arguments import Count, CountOrZero
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.fitted import FittedScore
from lightning_gradmetrics.scoring.registry import Recipe, Score, ScoreLike, add_recipe, make
from lightning_gradmetrics.scoring.totals import Tensors

__all__ = ["views"]


def views(
    score: ScoreLike = "max_softmax",
    *,
    n: Count = 10,
    seed: CountOrZero = 0,
    transforms: Views | None = None,
    name: str | None = None,
) -> Score:
    r"""A score averaged over n views of the input: ``mean_v s(x_v)``.

    The views are the input itself and ``n - 1`` shifted copies, every other one flipped. The shifts are the same for
    every sample, so that a score does not depend on its batch. The prediction in the results is that of the plain
    input, so ``max_softmax`` averages the probability of the class that is predicted for the plain input. It takes n
    forward passes, including the one for the prediction; scores of logits and of the head's input share them. Other
    scores cost n times as much. Compare it with other scores at equal cost.

    Views help if shifts and flips preserve the meaning of an image. They do not on digits of 8 x 8 pixels, where a
    shift of one pixel is an eighth of the image (the leaderboard's page has the figures); pass ``transforms=`` for such
    data.

    Args:
        score: The score to average: a name, a score, or a function of the evidence. A fitted score without a state is
            fitted on the plain inputs, as usual.
        n: The number of views; 1 is the score itself.
        seed: The seed of the shifts.
        transforms: A function from inputs ``(N, ...)`` to a sequence of views of the same shape, which replaces the
            default views and n.
        name: Another name for the score.

    Returns:
        A score with values ``(N,)``.

    Raises:
        TypeError: If the inputs are not one float tensor, or not images ``(N, C, H, W)`` and there are no transforms.
        ValueError: If the score needs labels, or needs a fit and more than logits and the head's input.

    Example:
        >>> import lightning_gradmetrics as lgm
        >>> model, images = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3)), torch.randn(2, 3, 4, 4)
        >>> lgm.score(model, images, views("energy", n=4))["views(score=energy,n=4)"].shape
        torch.Size([2])

    Reference:
        M. Ayhan and P. Berens, "Test-time Data Augmentation for Estimation of Heteroscedastic Aleatoric Uncertainty in
        Deep Neural Networks", MIDL 2018, https://openreview.net/forum?id=rJZz-knjz
    """
    arguments = {"score": score, "n": n, "seed": seed, "transforms": transforms}
    changed = {key: value for key, value in arguments.items() if value != RECIPE.defaults[key]}
    inner = make(score)
    if isinstance(inner, FittedScore) and inner.state is None:
        return FittedViews(inner, changed, name)
    return ViewsScore(inner, changed, name)


class ViewsRecipe(Recipe):
    """The recipe of ``views``; calling it also makes the score that is averaged."""

    @property
    def defaults(self) -> dict[str, Any]:
        """The arguments with their defaults."""
        return {"score": "max_softmax", "n": 10, "seed": 0, "transforms": None}

    def __call__(self, *, name: str | None = None, **arguments: Any) -> Score:
        """Return the score with these arguments."""
        self.check_names(arguments)
        return views(**arguments, name=name)


RECIPE = ViewsRecipe("views", views, "baseline", "Ayhan & Berens 2018, MIDL")
add_recipe(RECIPE)
views.recipe = RECIPE  # type: ignore[attr-defined]


class ViewsScore(Score):
    """A score averaged over views.

    Args:
        inner: The score that is averaged; a fitted score has its state.
        arguments: The arguments that differ from the defaults.
        name: The name.
    """

    def __init__(self, inner: Score, arguments: dict[str, Any], name: str | None) -> None:
        _check_labels(inner)
        settings = {**RECIPE.defaults, **arguments}
        self.inner, self.n = inner, settings["n"]
        self.transforms, seed = settings["transforms"], settings["seed"]
        view_set = ViewSet(self.n, seed, transforms=self.transforms)
        self.outputs, self.means = ViewOutputs(view_set, inner.needs.features), ViewMeans(inner, view_set)
        super().__init__(name or _name(inner, arguments), replace(RECIPE, family=inner.recipe.family), arguments)

    def look(self, evidence: Evidence) -> None:
        """Request all evidence that scoring needs; a dry run of this method needs no state."""
        if reads_outputs(self.inner):
            view_evidence(self.outputs, evidence)
        elif self.transforms is not None or self.n > 1:
            evidence.probe(self.means)
        if self.transforms is None:
            getattr(self.inner, "look", self.inner)(evidence)

    def _values(self, evidence: Evidence) -> Tensor:
        if reads_outputs(self.inner):
            views = view_evidence(self.outputs, evidence)
            total = evidence.logits.new_zeros(len(evidence.logits))
            for view in views:
                total = total + self._of_view(view, evidence)
            return total / len(views)
        if self.transforms is not None:
            return evidence.probe(self.means).to(evidence.logits.dtype)
        plain = self.inner(evidence)
        return plain if self.n == 1 else (plain + (self.n - 1) * evidence.probe(self.means).to(plain)) / self.n

    def _of_view(self, view: Evidence, evidence: Evidence) -> Tensor:
        """Return the score of one view; for the softmax, the probability of all classes but the plain prediction."""
        if self.inner.recipe.name != "max_softmax":
            return self.inner(view)
        p = torch.softmax(view.logits / self.inner.arguments.get("temperature", 1.0), 1)
        return p.scatter(1, evidence.logits.argmax(1, keepdim=True), 0.0).sum(1)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the score that is averaged, and the arguments."""
        return ViewsScore, (self.inner, self.arguments, self.name)


class FittedViews(FittedScore):
    """A fitted score averaged over views, fitted on the plain inputs.

    Args:
        unfitted: The score that is averaged, which has no state.
        arguments: The arguments that differ from the defaults.
        name: The name.
    """

    def __init__(self, unfitted: FittedScore, arguments: dict[str, Any], name: str | None) -> None:
        _check_labels(unfitted)
        is_standard = type(unfitted)._values is FittedScore._values
        if not is_standard or not reads_outputs(unfitted):
            raise ValueError(
                f"views averages a fitted score, and {unfitted.name!r} has no state: fit it first, as in "
                f"views(lgm.fit(model, batches, {unfitted.name!r})[0])"
            )
        settings = {**RECIPE.defaults, **arguments, "score": unfitted.name}
        self.unfitted = unfitted
        self.state = self.model = self.head = None
        view_set = ViewSet(settings["n"], settings["seed"], transforms=settings["transforms"])
        self.outputs = ViewOutputs(view_set, unfitted.needs.features)
        recipe = replace(RECIPE, family=unfitted.recipe.family)
        Score.__init__(self, name or _name(unfitted, arguments), recipe, {**arguments, "score": unfitted.name})

    def measure(self, evidence: Evidence) -> Tensors:
        measured = {}
        for number, view in enumerate(view_evidence(self.outputs, evidence)):
            for key, value in self.unfitted.measure(view).items():
                measured[f"{number}/{key}"] = value
        return measured

    def contribution(self, evidence: Evidence, keys: Tensor | None = None) -> Tensors:
        """Return one batch's contribution to the fit, from the plain inputs only."""
        return self.unfitted.contribution(evidence, keys)

    def finish(self, total: Tensors) -> Tensors:
        return self.unfitted.finish(total)

    def score(self, measured: Tensors, state: Tensors) -> Tensor:
        by_view: dict[str, Tensors] = {}
        for name, value in measured.items():
            number, _, key = name.partition("/")
            by_view.setdefault(number, {})[key] = value
        values = []
        for of_view in by_view.values():
            values.append(self.unfitted.score(of_view, state))
        return torch.stack(values).mean(0)


def _check_labels(inner: Score) -> None:
    if inner.needs.labels:
        raise ValueError(f"views cannot average {inner.name!r}, which needs true labels")


def _name(inner: Score, arguments: dict[str, Any]) -> str:
    shown = {**arguments, "score": inner.name} if "score" in arguments else arguments
    return RECIPE.name_of(shown)
