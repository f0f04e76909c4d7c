"""The settings for segmentation models: labels, aggregates, segments, metrics and maps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Pixels"]


@dataclass(frozen=True)
class Pixels:
    """Settings for the pixels of a segmentation model.

    Args:
        ignore_index: The label, or the labels, of pixels that no metric uses. Negative labels are always ignored.
        ood_labels: The labels of out-of-distribution pixels, which are positives of a separate task and never count as
            errors.
        class_names: The names of the classes, in order, for segments and metrics by class.
        aggregates: The aggregates of each score over the pixels of an image: ``"mean"``, ``"max"`` and quantiles such
            as ``"q95"``. The first becomes the score's column; the others become columns ``<score>/<aggregate>``.
        segments: The smallest number of pixels of a segment in ``callback.segments``; 0 for no segments.
        every: Metrics use every pixel (1), every n-th pixel, or at most 20,000 labelled pixels of an image
            (``"auto"``).
        bins: The number of cells for the pooled metrics, which then take constant memory; ``None`` keeps every value
            and is exact.
        resamples: The number of bootstrap resamples of images for the intervals; 0 for none.
        maps: The number of images whose maps are kept, chosen by the largest value of the first score.

    Raises:
        ValueError: If a value is not allowed.

    Example:
        >>> Pixels(ignore_index=11, aggregates=("mean", "q95")).ignored
        (11,)
    """

    ignore_index: int | Sequence[int] = 255
    ood_labels: Sequence[int] = ()
    class_names: Sequence[str] | None = None
    aggregates: Sequence[str] = ("mean",)
    segments: int = 50
    every: int | str = "auto"
    bins: int | None = 16384
    resamples: int = 200
    maps: int = 0

    def __post_init__(self) -> None:
        for name in ("segments", "maps", "resamples"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}={value!r}; expected a whole number of at least 0")
        if self.every != "auto" and (not isinstance(self.every, int) or self.every < 1):
            raise ValueError(f"every={self.every!r}; expected 'auto', or a whole number of at least 1")
        if not self.aggregates:
            raise ValueError("aggregates is empty; expected 'mean', 'max' or quantiles such as 'q95'")
        for aggregate in self.aggregates:
            if aggregate not in ("mean", "max") and not re.fullmatch(r"q\d{1,2}(\.\d+)?", aggregate):
                raise ValueError(f"aggregates names {aggregate!r}; expected 'mean', 'max' or a quantile such as 'q95'")
        both = set(self.ignored) & set(self.ood_labels)
        if both:
            raise ValueError(
                f"the label {min(both)} is in ignore_index and in ood_labels; a pixel can be only one of them"
            )

    def class_name(self, number: int, classes: int) -> str:
        """Return the name of a class, or its number if there are no names.

        Args:
            number: The class.
            classes: The number of the model's classes.

        Raises:
            ValueError: If the number of names differs from the number of classes.
        """
        if self.class_names is None:
            return str(number)
        if len(self.class_names) != classes:
            raise ValueError(
                f"class_names has {len(self.class_names)} names, but the model has {classes} classes: name all of them in "
                "order, including those that are never a label"
            )
        return self.class_names[number]

    @property
    def ignored(self) -> tuple[int, ...]:
        """The ignored labels."""
        return (self.ignore_index,) if isinstance(self.ignore_index, int) else tuple(self.ignore_index)

    @classmethod
    def of(cls, value: Any) -> Pixels:
        """Return the settings from an object, a mapping of its arguments, or ``None`` for the defaults.

        Raises:
            TypeError: If it is of any other type.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            known = [field.name for field in fields(cls)]
            for name in value:
                if name not in known:
                    raise TypeError(f"pixels= has no argument {name!r}; its arguments are: {', '.join(known)}")
            return cls(**value)
        raise TypeError(
            f"pixels= is a {type(value).__name__}; expected lightning_gradmetrics.Pixels(...) or a mapping of its arguments, as "
            "in pixels={'ignore_index': 11}"
        )
