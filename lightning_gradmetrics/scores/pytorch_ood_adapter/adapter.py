"""Detectors of the library pytorch-ood as scores, run as they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.scores.pytorch_ood_adapter.detectors import build, fit, predict
from lightning_gradmetrics.scores.pytorch_ood_adapter.specs import KNN, PARTS, REQUIRED, Plan, plan_of
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.fitted import FittedScore, Tensors, _not_fitted
from lightning_gradmetrics.scoring.registry import RECIPES, Recipe, Score

__all__ = ["DetectorRecipe", "DetectorScore", "FittedDetectorScore", "pytorch_ood"]

Cache = dict[Any, Any]


@dataclass(frozen=True)
class DetectorRecipe(Recipe):
    """The recipe of all detectors: a call makes the recipe of the one that is named, and of that a score.

    Args:
        functions: The class of its functions, as a fitted score has.
        plan: What the detector takes; ``None`` before one is named.
        extra: Arguments beyond its own that it was given.
    """

    functions: Any = None
    plan: Plan | None = None
    extra: tuple[str, ...] = ()

    @property
    def defaults(self) -> dict[str, Any]:
        """The arguments with their defaults, the detector's own among them once it is named."""
        if self.plan is None:
            return super().defaults
        return {"detector": REQUIRED, **self.plan.defaults, **dict.fromkeys(self.extra, REQUIRED)}

    @property
    def documentation(self) -> str:
        """The docstring, which begins with the detector's name once it is known."""
        text = inspect.getdoc(self.functions) or ""
        return text if self.plan is None else f"{self.plan.name} of pytorch-ood.\n\n{text}"

    def described(self) -> Score:
        """The default score, which can be looked at where pytorch-ood is not installed."""
        return FittedDetectorScore(self.name, replace(self, plan=KNN), self.defaults)

    def __call__(self, *, name: str | None = None, **arguments: Any) -> Score:
        """The score of a detector with its arguments, fitted or not as the detector is.

        Raises:
            ImportError: If pytorch-ood is not installed.
            TypeError: If the detector has no such argument, or one that it needs is missing.
            ValueError: If there is no such detector, or it cannot be run.
        """
        arguments = {**super().defaults, **{key: _plain(value) for key, value in arguments.items()}}
        own = _own(arguments)
        plan = plan_of(arguments["detector"], own)
        extra = tuple(key for key in own if key not in (*plan.defaults, *PARTS)) if plan.more else ()
        bound = replace(self, plan=plan, extra=extra, family=plan.family, paper=plan.paper)
        made = super(DetectorRecipe, bound).__call__(name=name, **arguments)
        missing = [key for key, value in bound.defaults.items() if value is REQUIRED and key not in arguments]
        if missing:
            raise TypeError(
                f"pytorch-ood's {plan.name} needs {missing[0]}=, as in "
                f"pytorch_ood(detector={plan.name}, {missing[0]}=...)"
            )
        kind = FittedDetectorScore if plan.fitted else DetectorScore
        return kind(made.name, bound, made.arguments)


def _plain(value: Any) -> Any:
    """Tensors and lists of any kind as lists, which a state's file can name."""
    if isinstance(value, Tensor):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _plan(score: Score) -> Plan:
    return score.recipe.plan  # type: ignore[attr-defined, no-any-return]


def _own(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != "detector"}


@dataclass(frozen=True)
class DetectorScore(Score):
    """The score of a detector that needs no fit."""

    def look(self, evidence: Evidence) -> None:
        """Look at everything that scoring needs, without running the detector."""
        _rows(self, evidence)

    def __call__(self, evidence: Evidence) -> Tensor:
        """Uncertainty of every sample, ``(N,)``."""
        return _scores(self, evidence)

    def detector(self, evidence: Evidence) -> Any:
        """The detector for this evidence: it is made anew each time, as the head may have changed."""
        plan = _plan(self)
        return build(plan, _own(self.arguments), None if plan.takes == "logits" else evidence.head)

    def detector_on(self, model: nn.Module, inputs: Tensor) -> Any:
        """The detector that runs the model, on the inputs' device."""
        return build(_plan(self), _own(self.arguments), model=model).to(inputs.device)


@dataclass(frozen=True)
class FittedDetectorScore(FittedScore):
    """The score of a detector that is fitted.

    Args:
        built: Detectors made of the state, by device, model and precision: they are made when they are first needed.
    """

    built: Cache = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def _functions(self) -> Any:
        return self.recipe.functions(_plan(self))  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        """What another process gets: the state, and not what was made of it."""
        return {**self.__dict__, "built": {}}

    def look(self, evidence: Evidence) -> None:
        """Look at everything that scoring needs."""
        _rows(self, evidence)

    def __call__(self, evidence: Evidence) -> Tensor:
        """Uncertainty of every sample, ``(N,)``.

        Raises:
            ValueError: If it is not fitted.
        """
        if self.state is None:
            raise ValueError(_not_fitted(self.name))
        return _scores(self, evidence)

    def detector(self, evidence: Evidence) -> Any:
        """The detector, fitted on the state's rows, on the evidence's device."""
        device = evidence.given_logits.device
        if device not in self.built:
            self.built[device] = _detector(_plan(self), self.arguments, self.state or {}).to(device)
        return self.built[device]

    def detector_on(self, model: nn.Module, inputs: Tensor) -> Any:
        """The detector that runs the model, fitted on the state's inputs, on the device and in the precision of these."""
        key = model, inputs.device, inputs.dtype
        if key not in self.built:
            state, plan = self.state or {}, _plan(self)
            made = build(plan, _own(self.arguments), model=model).to(inputs.device)
            self.built[key] = fit(plan, made, state["rows"].to(inputs), state["labels"].to(inputs.device))
        return self.built[key]


def _detector(plan: Plan, arguments: Mapping[str, Any], state: Tensors) -> Any:
    """The detector of a state, fitted on the CPU, where pytorch-ood's ``fit`` takes its features from too."""
    head = (state["weight"], state["bias"]) if "weight" in state else None
    return fit(plan, build(plan, _own(arguments), head), state["rows"], state["labels"])


# What detectors look at


@dataclass(frozen=True, eq=False)
class Prediction:
    """A probe: the scores ``(N,)`` of a detector that runs the model.

    Args:
        score: The score whose detector it is.
    """

    score: DetectorScore | FittedDetectorScore

    def __eq__(self, other: object) -> bool:
        """The same score's."""
        return isinstance(other, Prediction) and other.score is self.score

    def __hash__(self) -> int:
        return id(self.score)

    @property
    def backward(self) -> bool:
        """Whether it takes a backward pass."""
        return self.score.recipe.family == "gradient"

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        """The scores of the inputs."""
        rows = inputs_of(model, inputs)
        if self.backward:  # of a frozen layer too; who runs a probe leaves the model as it was
            model.requires_grad_(True)
        return predict(_plan(self.score), self.score.detector_on(model, rows), rows)


def inputs_of(model: nn.Module, inputs: Any) -> Tensor:
    """A probe: the inputs themselves.

    Raises:
        TypeError: If they are not one tensor.
    """
    if not isinstance(inputs, Tensor):
        raise TypeError(
            f"detectors of pytorch-ood that run the model take one tensor as its input, and this is a {type(inputs).__name__}: "
            "choose one that takes logits or features"
        )
    return inputs


inputs_of.backward = False  # type: ignore[attr-defined]


def _rows(score: Any, evidence: Evidence) -> Tensor:
    """What the score's detector looks at: of one that runs the model, what it found."""
    plan = _plan(score)
    if plan.takes == "model":
        return evidence.probe(Prediction(score))
    if plan.takes != "logits" and not plan.fitted:
        evidence.head  # noqa: B018  a dry run takes note
    return _seen(plan, evidence)


def _seen(plan: Plan, evidence: Evidence) -> Tensor:
    """Logits in the precision of all scores, or the head's input in float32, which the detectors' own code has."""
    return evidence.logits if plan.takes == "logits" else evidence.features.float()


def _scores(score: DetectorScore | FittedDetectorScore, evidence: Evidence) -> Tensor:
    rows = _rows(score, evidence)
    found = rows if _plan(score).takes == "model" else predict(_plan(score), score.detector(evidence), rows)
    return torch.where(evidence.logits.isfinite().all(1), found.to(evidence.logits.dtype), torch.nan)


def _registered(functions: type) -> DetectorRecipe:
    measure: Callable[..., Any] = functions.measure  # type: ignore[attr-defined]
    paper = "the library pytorch-ood, Kirchheim et al. 2022"
    recipe = DetectorRecipe(functions.__name__, measure, "baseline", paper, functions)
    RECIPES[recipe.name] = recipe
    return recipe


@_registered
@dataclass(frozen=True)
class pytorch_ood:
    r"""An outlier detector of the library pytorch-ood, run as it is.

    A detector by the name of its class, with its own arguments: ``pytorch_ood(detector=KNN, k=10)``. Install it with
    ``pip install "lightning-gradmetrics[pytorch-ood]"``. In ``conf/score/`` there is a file each for eight of them:
    ``pytorch_ood_knn``, ``_vim``, ``_mahalanobis``, ``_react``, ``_ash``, ``_gen``, ``_nnguide`` and ``_nacue``. All
    others run too, but for Gram, MultiMahalanobis, RankFeat and MahalanobisODIN, which take a network in pieces.

    Detectors of logits and of the head's input cost no forward. They are given logits in float64, and the head's input
    in float32, which their own code has; those that act on feature maps (ReAct, ASH, SCALE, VRA) act on the head's
    input as maps of size 1 x 1. Those that run the model (NAC-UE, GradNorm, ODIN, MC dropout) do so on their own, on
    one input tensor, and those that take gradients count as gradient scores.

    What is fitted is pytorch-ood's own ``fit``, on a uniform sample of the data: all of them up to 50,000 samples or 34
    million numbers, so up to there it is the same fit. The state is that sample, the logits, the head's input or, for
    detectors that run the model, the model's inputs themselves; the detector is made of it when it is first needed.
    Labels are needed only where the detector needs classes (as Mahalanobis does).

    Arguments that are left out have pytorch-ood's defaults, but for two that have none: ``d`` of ViM is half of the
    head's input, and ``layers`` of NAC-UE (names, as in ``layers='layer3+layer4'``) are the model's blocks or else its
    layers, without the head. Defaults are made for large data: k=50 of KNN looks past a class with fewer samples in the
    fit, and then says the opposite. Random numbers are drawn from a seed of their own.
    """

    plan: Plan

    def measure(self, evidence: Evidence, *, detector: str = "KNN", **arguments: Any) -> Tensors:
        return {"rows": evidence.probe(inputs_of) if self.plan.takes == "model" else _seen(self.plan, evidence)}

    def accumulate(self, evidence: Evidence, measured: Tensors, *, detector: str, **arguments: Any) -> Tensors:
        rows = measured["rows"]
        labels = evidence.labels.long() if self.plan.classes else torch.zeros(len(rows), dtype=torch.long)
        found = {"rows/rows": rows, "rows/labels": labels}
        if self.plan.takes in ("features", "maps"):
            weight, bias = evidence.head
            found |= {"model/weight": weight.float(), "model/bias": bias.float()}
        return found

    def finish(self, total: Tensors, *, detector: str, **arguments: Any) -> Tensors:
        state = {key.partition("/")[2]: value for key, value in total.items()}
        if self.plan.takes != "model":
            made = _detector(self.plan, arguments, state)
            if not predict(self.plan, made, state["rows"][:8]).isfinite().all():
                raise ValueError(
                    f"pytorch-ood's {detector} gives no finite score to samples that it was fitted on, of "
                    f"{state['rows'].shape[1]} numbers each: its arguments do not suit them"
                )
        return state
