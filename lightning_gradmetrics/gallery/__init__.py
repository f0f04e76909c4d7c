"""Pictures of a run: sources look at the batches as they are scored; loggers, files and the report take the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_gradmetrics.gallery.base import (
    Picture,
    PictureSource,
    ScoredBatch,
    log_pictures,
    write_pictures,
    write_tables,
)
from lightning_gradmetrics.gallery.examples import ExampleGallery
from lightning_gradmetrics.gallery.maps import MapGallery
from lightning_gradmetrics.gallery.profiles import ProfileGallery
from lightning_gradmetrics.profile import Profile
from lightning_gradmetrics.scores.registry import Score

__all__ = [
    "ExampleGallery",
    "MapGallery",
    "Picture",
    "PictureSource",
    "ProfileGallery",
    "ScoredBatch",
    "log_pictures",
    "picture_sources",
    "write_pictures",
    "write_tables",
]


def picture_sources(
    scores: Sequence[Score], profile: Profile | None = None, examples: Mapping[str, int] | None = None
) -> list[PictureSource]:
    """The picture sources of a run: the profile, the examples, and the maps where a score looks at them.

    Args:
        scores: The run's scores.
        profile: What the profile is of, or ``None`` for none.
        examples: How many samples to show of each score's largest.

    Raises:
        ValueError: If there is no score of a name in ``examples``, or a number is not a whole one above 0.

    Example:
        >>> from lightning_gradmetrics.scores import resolve
        >>> [type(source).__name__ for source in picture_sources(resolve(["gga", "entropy"]), Profile(), {"entropy": 5})]
        ['ProfileGallery', 'ExampleGallery', 'MapGallery']
    """
    found: list[PictureSource] = []
    if profile is not None:
        found.append(ProfileGallery(profile))
    if examples:
        _check_examples([score.name for score in scores], examples)
        found.append(ExampleGallery(dict(examples)))
    maps = MapGallery.of(scores)
    return found if maps is None else [*found, maps]


def _check_examples(names: Sequence[str], examples: Mapping[str, int]) -> None:
    for name, count in examples.items():
        if name not in names:
            raise ValueError(f"examples= names the score {name!r}, which is not one of the run's: {', '.join(names)}")
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"examples={{{name!r}: {count!r}}}; expected a whole number of samples of at least 1")
