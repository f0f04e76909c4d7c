"""What tells one detector of pytorch-ood from another: what it is given, what it is fitted on, how it is built and run."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_gradmetrics.forward import gradients_enabled
from lightning_gradmetrics.scores.registry import Family

__all__ = ["KNN", "PARTS", "REQUIRED", "Plan", "build", "fit", "plan_of", "predict", "stages"]

Takes = Literal["logits", "features", "maps", "model"]


class _Required:
    def __repr__(self) -> str:
        return "(to be given)"


REQUIRED = _Required()
"""Stands for the default of an argument that has none."""

PARTS = ("self", "model", "encoder", "backbone", "head", "w", "b", "device", "detector")
"""Parameters of detectors that are no arguments of the score: they are filled in here, or keep their default."""

FILLED = ("layers", "d")
"""Parameters that are filled in where they are not given."""

NO_CLASSES = ("KNN", "ViM", "NNGuide", "ReAct", "VRA", "DICE", "fDBD", "NCI", "PNML", "KLMatching", "NACUE")
"""Detectors that use labels only to leave out-of-distribution samples aside: they are fitted without labels."""

APART = "it takes the network apart into pieces that follow each other, which no model gives by itself"
REFUSED = {
    "Gram": APART,
    "MultiMahalanobis": APART,
    "RankFeat": "it takes feature maps with a width and a height, and the head's input has neither",
    "MahalanobisODIN": "it differentiates through an encoder, and the head's input comes without one",
}
"""Detectors that cannot be run, and why."""

BATCH = 128
"""Samples in a batch when a detector that runs the model is fitted."""


@dataclass(frozen=True)
class Plan:
    """What a detector takes.

    Args:
        name: Its class's name.
        takes: ``"logits"``, the head's input (``"features"``, or as ``"maps"`` of size 1 x 1), or the ``"model"``.
        fitted: Whether it is fitted.
        classes: Whether the fit needs true labels.
        family: ``"gradient"`` if it takes gradients.
        defaults: Its own arguments with their default values.
        more: Whether it takes arguments beyond them.
        paper: Where it comes from.
    """

    name: str
    takes: Takes
    fitted: bool
    classes: bool = False
    family: Family = "baseline"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    more: bool = False
    paper: str = ""


KNN = Plan("KNN", "features", fitted=True)
"""The default detector's plan, for tables made where pytorch-ood is not installed."""


def _detectors() -> dict[str, Any]:
    """All detectors by name.

    Raises:
        ImportError: If pytorch-ood is not installed.
    """
    try:
        from pytorch_ood import detector as library
        from pytorch_ood.api import Detector, DetectorInfo  # noqa: F401  since 0.4
    except ImportError as error:
        raise ImportError(
            "the score 'pytorch_ood' runs detectors of pytorch-ood 0.4 or later, which is not installed: "
            'pip install "lightning-gradmetrics[pytorch-ood]"'
        ) from error
    found = {name: getattr(library, name) for name in library.__all__}
    return {name: kind for name, kind in found.items() if inspect.isclass(kind) and issubclass(kind, Detector)}


def _class(name: str) -> Any:
    """The detector's class.

    Raises:
        ValueError: If there is no detector of that name, or it cannot be run.
    """
    known = _detectors()
    allowed = sorted(set(known) - set(REFUSED), key=str.lower)
    if name in known and name not in REFUSED:
        return known[name]
    if name in REFUSED:
        raise ValueError(
            f"pytorch-ood's {name} cannot be run as a score: {REFUSED[name]}; those that can: {', '.join(allowed)}"
        )
    lower = {key.lower(): key for key in allowed}
    near = [lower[key] for key in difflib.get_close_matches(str(name).lower().replace("-", ""), lower, 3, 0.5)]
    hint = f" did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"pytorch-ood has no detector {name!r};{hint} available: {', '.join(allowed)}")


def plan_of(name: str, arguments: Mapping[str, Any]) -> Plan:
    """The plan of a detector with its arguments.

    Raises:
        ImportError: If pytorch-ood is not installed.
        ValueError: If there is no such detector, or it cannot be run.
    """
    kind = _class(name)
    from pytorch_ood import api

    kinds: dict[Takes, Any] = {
        "logits": api.LogitsDetector,
        "features": api.FeaturesDetector,
        "maps": api.FeatureMapsDetector,
    }
    parameters = inspect.signature(kind.__init__).parameters.values()
    paper = kind.info.paper if kind.info else None
    return Plan(
        name,
        takes=next((what for what, base in kinds.items() if issubclass(kind, base)), "model"),
        # A detector that is given what a fit would find (ReAct's threshold) is not fitted.
        fitted=kind.requires_fit and arguments.get("threshold") is None,
        classes=kind.requires_fit and name not in NO_CLASSES,
        family="gradient" if issubclass(kind, api.GradientDetector) else "baseline",
        defaults={
            p.name: (None if p.name in FILLED else REQUIRED) if p.default is p.empty else p.default
            for p in parameters
            if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in PARTS
        },
        more=any(p.kind is p.VAR_KEYWORD for p in parameters),
        paper=f"{paper.title}, {paper.venue} {paper.year}, in pytorch-ood" if paper else "in pytorch-ood",
    )


# Building


def build(
    plan: Plan,
    arguments: Mapping[str, Any],
    head: tuple[Tensor, Tensor] | None = None,
    model: nn.Module | None = None,
) -> Any:
    """The detector, not fitted.

    Args:
        plan: Its plan.
        arguments: Its own arguments.
        head: The head's weight ``(C, D)`` and bias ``(C,)``, where it takes the head's input.
        model: The model, where it takes that.
    """
    kind = _class(plan.name)
    taken = inspect.signature(kind.__init__).parameters
    device = torch.device("cpu") if head is None else head[0].device
    given = {key: _tensor(value, taken.get(key)) for key, value in arguments.items() if value is not None}
    parts: dict[str, Any] = {"model": model, "encoder": None, "backbone": nn.Identity()}
    if head is not None:
        with _steady(device):
            parts |= _head_parts(*head, flat=plan.takes == "maps")
    if model is not None and "layers" in taken:
        given["layers"] = _layers(model, given.get("layers"))
    with _steady(device):
        return kind(**{**{key: part for key, part in parts.items() if key in taken}, **given})


def _head_parts(weight: Tensor, bias: Tensor, flat: bool) -> dict[str, Any]:
    """The head as detectors take it: a module of their own, or its weight and bias; in float32, as their code has it."""
    head = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=torch.float32).requires_grad_(False)
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    module = nn.Sequential(nn.Flatten(), head) if flat else head
    return {"head": module, "w": head.weight, "b": head.bias, "d": weight.shape[1] // 2}


def _tensor(value: Any, parameter: inspect.Parameter | None) -> Any:
    """Numbers as a tensor where the detector takes one."""
    return torch.tensor(value) if parameter is not None and parameter.annotation in (Tensor, "Tensor") else value


def _layers(model: nn.Module, names: Any) -> list[nn.Module]:
    """The named submodules, or the model's stages.

    Raises:
        ValueError: If there is no submodule of that name.
    """
    if names is None:
        names = stages(model)
    elif isinstance(names, str):
        names = names.split("+")
    known = dict(model.named_modules())
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"the model has no layer {unknown[0]!r}; its layers are: {', '.join(list(known)[1:40])}. Name them as in "
            "layers='layer3+layer4'"
        )
    return [known[name] for name in names]


def stages(model: nn.Module) -> list[str]:
    """Names of the model's stages: its blocks, or where it has none its layers with a weight matrix, without the head.

    Example:
        >>> stages(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)))
        ['0']
    """
    prefix, children = "", _weighted(model)
    while len(children) == 1:
        prefix, model = f"{prefix}{next(iter(children))}.", next(iter(children.values()))
        children = _weighted(model)
    found = dict(list(children.items())[:-1])
    if not found:
        raise ValueError("the model has no layers before its head that can be told apart: name them in layers=")
    blocks = [name for name, child in found.items() if _weighted(child)]
    return [prefix + name for name in blocks or found]


def _weighted(model: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in model.named_children() if any(p.ndim > 1 for p in child.parameters())}


# Fitting and running


@contextmanager
def _steady(device: torch.device) -> Iterator[None]:
    """With gradients, and with random numbers of its own, the same every time."""
    number = (device.index or 0) if device.type == "cuda" else None
    with torch.random.fork_rng([] if number is None else [number]), gradients_enabled():
        torch.default_generator.manual_seed(0)
        if number is not None:
            torch.cuda.default_generators[number].manual_seed(0)
        yield


def fit(plan: Plan, detector: Any, rows: Tensor, labels: Tensor) -> Any:
    """The detector, fitted.

    Args:
        plan: Its plan.
        detector: What :func:`build` gave.
        rows: Logits, features or inputs ``(N, ...)``.
        labels: True labels ``(N,)``; zeros where the detector needs none.

    Raises:
        ValueError: If it cannot be fitted on them.
    """
    try:
        with _steady(rows.device):
            if plan.takes == "model":
                return detector.fit(list(zip(torch.split(rows, BATCH), torch.split(labels, BATCH), strict=True)))
            if plan.takes == "maps":
                return detector.fit_feature_maps(rows[:, :, None, None], labels)
            return detector.fit_logits(rows, labels) if plan.takes == "logits" else detector.fit_features(rows, labels)
    except (AssertionError, ValueError, RuntimeError) as error:
        found = f", classes {sorted(set(labels.tolist()))}" if plan.classes else ""
        raise ValueError(
            f"pytorch-ood's {plan.name} could not be fitted on these {len(rows)} samples of shape "
            f"{tuple(rows.shape[1:])}{found}: {str(error) or 'it takes samples of all classes, from 0 up without a gap'}"
        ) from error


def predict(plan: Plan, detector: Any, rows: Tensor) -> Tensor:
    """The scores ``(N,)`` of rows ``(N, ...)``, higher = more of an outlier; NaN where a row is not finite."""
    finite = rows.flatten(1).isfinite().all(1)
    found = torch.full(
        (len(rows),),
        torch.nan,
        dtype=torch.float64 if rows.dtype == torch.float64 else torch.float32,
        device=rows.device,
    )
    if finite.any():
        found[finite] = _predict(plan, detector, rows[finite]).detach().to(found)
    return found


def _predict(plan: Plan, detector: Any, rows: Tensor) -> Tensor:
    with _steady(rows.device):
        rows = rows.clone() if rows.is_inference() else rows
        if plan.takes == "model":
            return detector.predict(rows)  # type: ignore[no-any-return]
        if plan.takes == "maps":
            return detector.predict_feature_maps(rows[:, :, None, None])  # type: ignore[no-any-return]
        call = detector.predict_logits if plan.takes == "logits" else detector.predict_features
        return call(rows)  # type: ignore[no-any-return]
