"""Per-sample gradient uncertainty scores for PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gradmetrics import evaluation, export, meters, ray, scores
    from lightning_gradmetrics.callback import GradientMetrics
    from lightning_gradmetrics.engine import GradientStatistics, gradient_statistics
    from lightning_gradmetrics.gradients import cosine_similarity_maps
    from lightning_gradmetrics.language import score_generation, watching_generation
    from lightning_gradmetrics.pictures import plot
    from lightning_gradmetrics.pictures.pixels import Pixels
    from lightning_gradmetrics.results import read_results, unfinished
    from lightning_gradmetrics.scoring import cross_fit, fit, gradient_features, gradient_profile, score

__version__ = "0.1.0"

__all__ = [
    "GradientMetrics",
    "GradientStatistics",
    "Pixels",
    "cosine_similarity_maps",
    "cross_fit",
    "evaluation",
    "export",
    "fit",
    "gradient_features",
    "gradient_profile",
    "gradient_statistics",
    "meters",
    "plot",
    "ray",
    "read_results",
    "score",
    "score_generation",
    "scores",
    "unfinished",
    "watching_generation",
]

_ROOMS = {
    "GradientMetrics": "callback",
    "GradientStatistics": "engine",
    "Pixels": "pictures.pixels",
    "cosine_similarity_maps": "gradients",
    "cross_fit": "scoring",
    "fit": "scoring",
    "gradient_features": "scoring",
    "gradient_profile": "scoring",
    "gradient_statistics": "engine",
    "read_results": "results",
    "score": "scoring",
    "score_generation": "language",
    "unfinished": "results",
    "watching_generation": "language",
}
"""The room of every public object; a name that is missing here is a room itself, or in ``_MODULES``."""

_MODULES = {"plot": "pictures.plot"}
"""Public modules inside a room."""

_ROOMS_WITH_SCORES = ("scoring", "callback", "language")
"""Rooms whose functions look scores up by name: the score files are imported with them, which registers the names."""


def __getattr__(name: str) -> Any:
    """Import a public name on its first use, so that ``import lightning_gradmetrics`` is fast."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _ROOMS:
        if _ROOMS[name] in _ROOMS_WITH_SCORES:
            import_module(f"{__name__}.scores")
        value = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    else:
        value = import_module(f"{__name__}.{_MODULES.get(name, name)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, without the imports of this file, for completion."""
    return sorted(__all__)
