"""Pictures of a run: sources look at the batches as they are scored; loggers, files and the report take the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_gradmetrics.pictures.base import (
    Picture,
    PictureSource,
    ScoredBatch,
    log_pictures,
    write_pictures,
    write_tables,
)
from lightning_gradmetrics.pictures.examples import ExampleGallery
from lightning_gradmetrics.pictures.maps import MapGallery
from lightning_gradmetrics.pictures.profiles import ProfileGallery
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
    "log_pictures",
    "picture_sources",
    "write_pictures",
    "write_tables",
]


def picture_sources(
    scores: Sequence[Score], profile: Profile | None = None, top_k: Mapping[str, int] | None = None
) -> list[PictureSource]:
    """The picture sources of a run: the profile, the examples, and the maps where a score looks at them.

    Args:
        scores: The run's scores.
        profile: What the profile is of, or ``None`` for none.
        top_k: How many samples to show of each score's largest.

    Example:
        >>> from lightning_gradmetrics.scores import resolve
        >>> [type(source).__name__ for source in picture_sources(resolve(["gga", "entropy"]), Profile(), {"entropy": 5})]
        ['ProfileGallery', 'ExampleGallery', 'MapGallery']
    """
    found: list[PictureSource | None] = [
        ProfileGallery(profile) if profile else None,
        ExampleGallery(top_k) if top_k else None,
        MapGallery.of(scores),
    ]
    return [source for source in found if source is not None]


def check_top_k(names: Sequence[str], top_k: Mapping[str, int]) -> dict[str, int]:
    """The number of samples to keep of each score, checked.

    Args:
        names: Of the run's scores.
        top_k: How many samples, by score.

    Raises:
        ValueError: If there is no score of a name, or a number is not a whole one above 0.
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
