"""Detectors of the library pytorch-ood as scores, run unmodified."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.scores.pytorch_ood_adapter.detectors import build, fit, predict
from lightning_gradmetrics.scores.pytorch_ood_adapter.specs import KNN, PARTS, REQUIRED, Spec, spec_of
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.fitted import FittedScore, not_fitted
from lightning_gradmetrics.scoring.positions import by_rows
from lightning_gradmetrics.scoring.registry import RECIPES, Recipe, Score, add_recipe
from lightning_gradmetrics.scoring.totals import Tensors

__all__ = ["DetectorRecipe", "DetectorScore", "FittedDetectorScore", "pytorch_ood"]


def pytorch_ood(*, detector: str = "KNN", **arguments: Any) -> Score:
    r"""An outlier detector of the library pytorch-ood, run unmodified.

    Install it with ``pip install "lightning-gradmetrics[pytorch-ood]"``. ``conf/score/`` has one file for each of eight
    detectors: ``pytorch_ood_knn``, ``_vim``, ``_mahalanobis``, ``_react``, ``_ash``, ``_gen``, ``_nnguide`` and
    ``_nacue``. All other detectors run too, except Gram, MultiMahalanobis, RankFeat and MahalanobisODIN.

    Detectors of logits and of the head's input need no extra forward pass. They receive logits in float64 and the
    head's input in float32, as their own code expects. Detectors of feature maps (ReAct, ASH, SCALE, VRA) receive the
    head's input as maps of size 1 x 1. Detectors that run the model (NAC-UE, GradNorm, ODIN, MC dropout) accept one
    input tensor. Detectors that use gradients count as gradient scores.

    The fit calls pytorch-ood's own ``fit`` on a uniform sample of the data of at most 50,000 samples and 34 million
    numbers. The state is that sample: the logits, the head's input or, for detectors that run the model, the model's
    inputs. The detector is rebuilt from the state on first use. Labels are needed only if the detector needs classes,
    as Mahalanobis does. Random numbers come from a fixed seed.

    Args:
        detector: The name of the detector's class.
        **arguments: The detector's own arguments, with pytorch-ood's defaults. For two arguments without a default,
            this package sets one: ``d`` of ViM is half of the head's input, and ``layers`` of NAC-UE (names, as in
            ``layers='layer3+layer4'``) are the model's blocks, or else its layers, without the head. The defaults suit
            large data: KNN with k=50 ranks in reverse if a class has fewer than 50 samples in the fit.

    Returns:
        A score with values ``(N,)``, higher = more of an outlier. It needs a fit if the detector does.

    Raises:
        ImportError: If pytorch-ood is not installed.
        TypeError: If the detector has no such argument, or a required one is missing.
        ValueError: If there is no such detector, or it cannot be run.

    Example:
        >>> pytorch_ood(detector="GEN", gamma=0.2)
        pytorch_ood(detector=GEN,gamma=0.2)

    Reference:
        K. Kirchheim, M. Filax and F. Ortmeier, "PyTorch-OOD: A Library for Out-of-Distribution Detection Based on
        PyTorch", CVPR Workshops 2022, https://github.com/kkirchheim/pytorch-ood
    """
    return RECIPES["pytorch_ood"](detector=detector, **arguments)


@dataclass(frozen=True)
class DetectorRecipe(Recipe):
    """The recipe of all detectors. Calling it binds the recipe to the named detector and makes its score.

    Args:
        spec: The detector's specification; ``None`` before a detector is named.
        extra: Arguments that the detector takes beyond its own.
    """

    spec: Spec | None = None
    extra: tuple[str, ...] = ()

    @property
    def defaults(self) -> dict[str, Any]:
        """The arguments with their defaults, including the detector's own once it is named."""
        if self.spec is None:
            return super().defaults
        return {"detector": REQUIRED, **self.spec.defaults, **dict.fromkeys(self.extra, REQUIRED)}

    @property
    def documentation(self) -> str:
        """The docstring, which begins with the detector's name once it is known."""
        text = inspect.getdoc(self.method) or ""
        return text if self.spec is None else f"{self.spec.name} of pytorch-ood.\n\n{text}"

    @property
    def annotations(self) -> dict[str, Any]:
        """Return no annotations, because the detectors check their own arguments."""
        return {}

    def described(self) -> Score:
        """Return the default score, which can be described without pytorch-ood."""
        return FittedDetectorScore(self.name, replace(self, spec=KNN), self.defaults)

    def __call__(self, *, name: str | None = None, **arguments: Any) -> Score:
        """Return the score of a detector with its arguments.

        Raises:
            ImportError: If pytorch-ood is not installed.
            TypeError: If the detector has no such argument, or a required one is missing.
            ValueError: If there is no such detector, or it cannot be run.
        """
        all_arguments = super().defaults
        for key, value in arguments.items():
            all_arguments[key] = _plain(value)
        own = _own(all_arguments)
        spec = spec_of(all_arguments["detector"], own)
        extra = []
        if spec.more:
            extra = [key for key in own if key not in (*spec.defaults, *PARTS)]
        bound = replace(self, spec=spec, extra=tuple(extra), family=spec.family, paper=spec.paper)
        bound.check_names(all_arguments)
        missing = [key for key, value in bound.defaults.items() if value is REQUIRED and key not in all_arguments]
        if missing:
            raise TypeError(
                f"pytorch-ood's {spec.name} needs {missing[0]}=, as in "
                f"pytorch_ood(detector={spec.name}, {missing[0]}=...)"
            )
        kind = FittedDetectorScore if spec.fitted else DetectorScore
        return kind(name or bound.name_of(all_arguments), bound, all_arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the detector's specification."""
        if self.spec is None:
            return super().__reduce__()
        return _bound, (self.spec, self.extra)


def _bound(spec: Spec, extra: tuple[str, ...]) -> Recipe:
    return replace(RECIPE, spec=spec, extra=extra, family=spec.family, paper=spec.paper)


RECIPE = DetectorRecipe("pytorch_ood", pytorch_ood, "baseline", "the library pytorch-ood, Kirchheim et al. 2022")
add_recipe(RECIPE)
pytorch_ood.recipe = RECIPE  # type: ignore[attr-defined]


def _plain(value: Any) -> Any:
    """Return tensors and sequences as lists, which the file of a state can store."""
    if isinstance(value, Tensor):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _spec(score: Score) -> Spec:
    return score.recipe.spec  # type: ignore[attr-defined, no-any-return]


def _own(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != "detector"}


class DetectorScore(Score):
    """The score of a detector that needs no fit."""

    def look(self, evidence: Evidence) -> None:
        """Request all evidence that scoring needs, without running the detector."""
        _rows(self, evidence)

    def _values(self, evidence: Evidence) -> Tensor:
        return _scores(self, evidence)

    def detector(self, evidence: Evidence) -> Any:
        """Return the detector for this evidence. It is rebuilt each time, because the head may have changed."""
        spec = _spec(self)
        return build(spec, _own(self.arguments), None if spec.takes == "logits" else evidence.head)

    def detector_on(self, model: nn.Module, inputs: Tensor) -> Any:
        """Return the detector that runs the model, on the inputs' device."""
        return build(_spec(self), _own(self.arguments), model=model).to(inputs.device)


class FittedDetectorScore(FittedScore):
    """The score of a detector that is fitted.

    Args:
        name: The score's name.
        recipe: The bound recipe.
        arguments: The detector's arguments.

    Attributes:
        built: Detectors built from the state, by device, model and precision.
    """

    def __init__(self, name: str, recipe: DetectorRecipe, arguments: Mapping[str, Any]) -> None:
        self.state = self.model = self.head = None
        self.built: dict[Any, Any] = {}
        Score.__init__(self, name, recipe, arguments)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, without the detectors built from it."""
        return {**self.__dict__, "built": {}}

    def with_state(self, state: Tensors | None, model: str | None, head: str | None) -> FittedDetectorScore:
        """Return the score with another state."""
        copied = super().with_state(state, model, head)
        copied.built = {}
        return copied

    def look(self, evidence: Evidence) -> None:
        """Request all evidence that scoring needs, without running the detector."""
        _rows(self, evidence)

    def _values(self, evidence: Evidence) -> Tensor:
        if self.state is None:
            raise ValueError(not_fitted(self.name))
        if evidence.has_positions:
            return by_rows(self._values, evidence, self.needs.features)
        return _scores(self, evidence)

    def measure(self, evidence: Evidence) -> Tensors:
        """Return the rows that the detector is fitted on."""
        spec = _spec(self)
        return {"rows": evidence.probe(inputs_of) if spec.takes == "model" else _read(spec, evidence)}

    def accumulate(self, evidence: Evidence, measured: Tensors) -> Tensors:
        """Return the rows, the labels if the detector needs classes, and the head."""
        rows, spec = measured["rows"], _spec(self)
        labels = evidence.labels.long() if spec.classes else torch.zeros(len(rows), dtype=torch.long)
        parts = {"rows/rows": rows, "rows/labels": labels}
        if spec.takes in ("features", "maps"):
            weight, bias = evidence.head
            parts |= {"model/weight": weight.float(), "model/bias": bias.float()}
        return parts

    def finish(self, total: Tensors) -> Tensors:
        """Return the rows; raise if the detector cannot be fitted on them, or returns no finite score."""
        state, spec = {key.partition("/")[2]: value for key, value in total.items()}, _spec(self)
        if spec.takes == "model":
            return state
        detector = _detector(spec, self.arguments, state)
        if not predict(spec, detector, state["rows"][:8]).isfinite().all():
            described = ", ".join(f"{key}={value!r}" for key, value in _own(self.arguments).items()) or "the defaults"
            raise ValueError(
                f"pytorch-ood's {spec.name} with {described} returns no finite score for samples that it was fitted on, of "
                f"{state['rows'].shape[1]} numbers each: change its arguments"
            )
        return state

    def detector(self, evidence: Evidence) -> Any:
        """Return the detector, fitted on the state's rows, on the evidence's device."""
        device = evidence.given_logits.device
        if device not in self.built:
            self.built[device] = _detector(_spec(self), self.arguments, self.state or {}).to(device)
        return self.built[device]

    def detector_on(self, model: nn.Module, inputs: Tensor) -> Any:
        """Return the detector that runs the model, fitted on the state's inputs, on the inputs' device and precision."""
        key = model, inputs.device, inputs.dtype
        if key not in self.built:
            state, spec = self.state or {}, _spec(self)
            made = build(spec, _own(self.arguments), model=model).to(inputs.device)
            self.built[key] = fit(spec, made, state["rows"].to(inputs), state["labels"].to(inputs.device))
        return self.built[key]


def _detector(spec: Spec, arguments: Mapping[str, Any], state: Tensors) -> Any:
    """Return the detector of a state, fitted on the CPU, as pytorch-ood's own ``fit`` is."""
    head = (state["weight"], state["bias"]) if "weight" in state else None
    return fit(spec, build(spec, _own(arguments), head), state["rows"], state["labels"])


@dataclass(frozen=True, eq=False)
class Prediction:
    """A probe: the scores ``(N,)`` of a detector that runs the model.

    Args:
        score: The detector's score.
    """

    score: DetectorScore | FittedDetectorScore

    def __eq__(self, other: object) -> bool:
        """Return whether the other belongs to the same score."""
        return isinstance(other, Prediction) and other.score is self.score

    def __hash__(self) -> int:
        return id(self.score)

    @property
    def backward(self) -> bool:
        """Whether the detector takes a backward pass."""
        return self.score.recipe.family == "gradient"

    @property
    def forwards(self) -> int:
        """The number of forward passes: two for ODIN (the input and the perturbed input), one for all others."""
        return 2 if _spec(self.score).name == "ODIN" else 1

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return the scores of the inputs."""
        rows = inputs_of(model, inputs)
        if self.backward:  # including frozen layers; the caller of a probe restores the model
            model.requires_grad_(True)
        return predict(_spec(self.score), self.score.detector_on(model, rows), rows)


def inputs_of(model: nn.Module, inputs: Any) -> Tensor:
    """Return the inputs: a probe.

    Raises:
        TypeError: If they are not one tensor.
    """
    if not isinstance(inputs, Tensor):
        raise TypeError(
            f"detectors of pytorch-ood that run the model take one tensor as its input, but this is a {type(inputs).__name__}: "
            "choose one that takes logits or features"
        )
    return inputs


inputs_of.backward = False  # type: ignore[attr-defined]
inputs_of.forwards = 0  # type: ignore[attr-defined]


def _rows(score: Any, evidence: Evidence) -> Tensor:
    """Return the rows that the score's detector reads, or the result of a detector that runs the model."""
    spec = _spec(score)
    if spec.takes == "model":
        return evidence.probe(Prediction(score))
    if spec.takes != "logits" and not spec.fitted:
        evidence.head  # noqa: B018  a dry run records it
    return _read(spec, evidence)


def _read(spec: Spec, evidence: Evidence) -> Tensor:
    """Return logits in the precision of the evidence, or the head's input in float32, as the detectors' code expects."""
    return evidence.logits if spec.takes == "logits" else evidence.features.float()


def _scores(score: DetectorScore | FittedDetectorScore, evidence: Evidence) -> Tensor:
    rows = _rows(score, evidence)
    values = rows if _spec(score).takes == "model" else predict(_spec(score), score.detector(evidence), rows)
    return torch.where(evidence.logits.isfinite().all(1), values.to(evidence.logits.dtype), torch.nan)
