"""What tells one detector of pytorch-ood from another: what it is given and what it is fitted on."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_gradmetrics.scoring.registry import Family

__all__ = ["KNN", "PARTS", "REQUIRED", "Plan", "detector_class", "plan_of"]

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


def detector_class(name: str) -> Any:
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
    kind = detector_class(name)
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
