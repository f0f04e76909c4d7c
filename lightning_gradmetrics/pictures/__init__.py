"""Pictures of a run: sources read each scored batch; their pictures go to loggers, files and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_gradmetrics.pictures.base import (
    Picture,
    PictureSource,
    ScoredBatch,
    write_pictures,
)
from lightning_gradmetrics.pictures.curves import curve_pictures
from lightning_gradmetrics.pictures.examples import ExampleGallery
from lightning_gradmetrics.pictures.loggers import log_pictures, log_pixels, log_samples, pixels_of, takes_pixels
from lightning_gradmetrics.pictures.maps import MapGallery
from lightning_gradmetrics.pictures.profiles import ProfileGallery
from lightning_gradmetrics.pictures.sample_files import sample_paths, write_thumbnails
from lightning_gradmetrics.scoring.layer_profile import Profile
from lightning_gradmetrics.scoring.registry import Score

__all__ = [
    "ExampleGallery",
    "MapGallery",
    "Picture",
    "PictureSource",
    "ProfileGallery",
    "ScoredBatch",
    "check_top_k",
    "curve_pictures",
    "log_pictures",
    "log_pixels",
    "log_samples",
    "picture_sources",
    "pixels_of",
    "sample_paths",
    "takes_pixels",
    "write_pictures",
    "write_thumbnails",
]


def picture_sources(
    scores: Sequence[Score], profile: Profile | None = None, top_k: Mapping[str, int] | None = None
) -> list[PictureSource]:
    """Return the picture sources of a run: the profile, the examples, and the maps if a score computes them.

    Args:
        scores: The run's scores.
        profile: The objective and norm of the layer profile, or ``None`` for no profile.
        top_k: Number of samples with the largest values to show, by score.

    Example:
        >>> from lightning_gradmetrics.scoring.registry import resolve
        >>> [type(source).__name__ for source in picture_sources(resolve(["gga", "entropy"]), Profile(), {"entropy": 5})]
        ['ProfileGallery', 'ExampleGallery', 'MapGallery']
    """
    sources: list[PictureSource] = []
    if profile:
        sources.append(ProfileGallery(profile))
    if top_k:
        sources.append(ExampleGallery(top_k))
    maps = MapGallery.of(scores)
    if maps is not None:
        sources.append(maps)
    return sources


def check_top_k(names: Sequence[str], top_k: Mapping[str, int]) -> dict[str, int]:
    """Check ``top_k`` and return it as a dict.

    Args:
        names: Names of the run's scores.
        top_k: Number of samples, by score.

    Raises:
        ValueError: If a name is not one of the run's scores, or a number is not a positive integer.
        TypeError: If ``top_k`` is not a mapping.
    """
    if not isinstance(top_k, Mapping):
        raise TypeError(
            f"top_k={top_k!r}; expected a mapping from a score's name to a number of samples, as in top_k={{{names[0]!r}: 20}}"
        )
    for name, count in top_k.items():
        if name not in names:
            raise ValueError(f"top_k= names the score {name!r}, which is not one of the run's: {', '.join(names)}")
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"top_k={{{name!r}: {count!r}}}; expected a whole number of samples of at least 1")
    return dict(top_k)
