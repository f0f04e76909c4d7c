"""Specifications of pytorch-ood's detectors: their input and the data that they are fitted on."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from lightning_gradmetrics.classifier.hints import did_you_mean
from lightning_gradmetrics.scoring.registry import Family

__all__ = ["KNN", "PARTS", "REQUIRED", "Spec", "detector_class", "spec_of"]

Takes = Literal["logits", "features", "maps", "model"]


class Required(Enum):
    """Marks an argument without a default value; pickling preserves its identity."""

    REQUIRED = "required"

    def __repr__(self) -> str:
        return "(required)"


REQUIRED = Required.REQUIRED

PARTS = ("self", "model", "encoder", "backbone", "head", "w", "b", "device", "detector")
"""Parameters of detectors that are not arguments of the score: they are set here or keep their default."""

FILLED = ("layers", "d")
"""Parameters that get a value here if they are not given."""

NO_CLASSES = ("KNN", "ViM", "NNGuide", "ReAct", "VRA", "DICE", "fDBD", "NCI", "PNML", "KLMatching", "NACUE")
"""Detectors that use labels only to skip out-of-distribution samples; they are fitted without labels."""

APART = "it needs the network as a list of consecutive pieces, which a model does not provide"
REFUSED = {
    "Gram": APART,
    "MultiMahalanobis": APART,
    "RankFeat": "it needs feature maps with a width and a height, and the head's input has neither",
    "MahalanobisODIN": "it differentiates through an encoder, and a score has only the head's input",
}
"""Detectors that cannot be run, with reasons."""


@dataclass(frozen=True)
class Spec:
    """The specification of a detector.

    Args:
        name: Its class's name.
        takes: ``"logits"``, the head's input (``"features"``, or as ``"maps"`` of size 1 x 1), or the ``"model"``.
        fitted: Whether it needs a fit.
        classes: Whether the fit needs true labels.
        family: ``"gradient"`` if it takes gradients.
        defaults: Its own arguments with their default values.
        more: Whether it takes further arguments.
        paper: The paper that proposed it.
    """

    name: str
    takes: Takes
    fitted: bool
    classes: bool = False
    family: Family = "baseline"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    more: bool = False
    paper: str = ""


KNN = Spec("KNN", "features", fitted=True)
"""The default detector's specification, for tables made without pytorch-ood."""


def _detectors() -> dict[str, Any]:
    """Return all detectors by name.

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
    exported = {name: getattr(library, name) for name in library.__all__}
    return {name: kind for name, kind in exported.items() if inspect.isclass(kind) and issubclass(kind, Detector)}


def detector_class(name: str) -> Any:
    """Return the detector's class.

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
    by_case = {key.lower(): key for key in allowed}
    hint = did_you_mean(by_case.get(str(name).lower().replace("-", ""), name), allowed)
    raise ValueError(f"pytorch-ood has no detector {name!r};{hint} available: {', '.join(allowed)}")


def spec_of(name: str, arguments: Mapping[str, Any]) -> Spec:
    """Return the specification of a detector with its arguments.

    Raises:
        ImportError: If pytorch-ood is not installed.
        ValueError: If there is no such detector, or it cannot be run.
    """
    kind = detector_class(name)
    from pytorch_ood import api

    bases: dict[Takes, Any] = {
        "logits": api.LogitsDetector,
        "features": api.FeaturesDetector,
        "maps": api.FeatureMapsDetector,
    }
    takes: Takes = "model"
    for input_kind, base in reversed(bases.items()):
        if issubclass(kind, base):
            takes = input_kind
    parameters = inspect.signature(kind.__init__).parameters.values()
    paper = kind.info.paper if kind.info else None
    return Spec(
        name,
        takes,
        # A detector whose fitted value is given as an argument (ReAct's threshold) is not fitted.
        fitted=kind.requires_fit and arguments.get("threshold") is None,
        classes=kind.requires_fit and name not in NO_CLASSES,
        family="gradient" if issubclass(kind, api.GradientDetector) else "baseline",
        defaults=_defaults(parameters),
        more=any(p.kind is p.VAR_KEYWORD for p in parameters),
        paper=f"{paper.title}, {paper.venue} {paper.year}, in pytorch-ood" if paper else "in pytorch-ood",
    )


def _defaults(parameters: Iterable[inspect.Parameter]) -> dict[str, Any]:
    """Return the detector's own arguments with their default values."""
    defaults: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.name not in PARTS:
            without = None if parameter.name in FILLED else REQUIRED
            defaults[parameter.name] = without if parameter.default is parameter.empty else parameter.default
    return defaults
