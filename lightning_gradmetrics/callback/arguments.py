"""Checks of the callback's arguments, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning_gradmetrics.evaluation import HIGHER_IS_BETTER, TASKS, Thresholds

__all__ = ["DEFAULT_METRICS", "check_callable", "check_metrics", "check_name", "check_resamples", "check_thresholds"]

DEFAULT_METRICS = ("auroc", "fpr95", "aurc")
"""The metrics that are logged."""


def _kind(value: Any) -> str:
    """Return the name of a value's type with the article "a" or "an"."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def check_name(argument: str, value: Any, example: str) -> str | None:
    """Return the name of a module, checked, or ``None``.

    Raises:
        TypeError: If it is not a string.
    """
    if value is None or isinstance(value, str):
        return value
    raise TypeError(
        f"{argument}= is {_kind(value)}; expected the name of a module in the model, as in {argument}={example!r}"
    )


def check_callable(argument: str, value: Any, signature: str) -> Callable[..., Any]:
    """Return the callable, checked.

    Raises:
        TypeError: If it is not a callable.
    """
    if callable(value):
        return value  # type: ignore[no-any-return]
    raise TypeError(f"{argument}= is {_kind(value)}; expected a callable {signature}")


def check_prefix(value: Any) -> str:
    """Return the prefix of the logged names, checked.

    Raises:
        ValueError: If it is not a word.
    """
    if isinstance(value, str) and value.strip("/ "):
        return value
    raise ValueError(
        f"prefix={value!r}; expected a word as the start of the logged metrics' names, such as 'gradmetrics'"
    )


def check_resamples(value: Any) -> int:
    """Return the number of bootstrap resamples, checked.

    Raises:
        ValueError: If it is not a whole number of at least 0.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"resamples={value!r}; expected a whole number of at least 0, such as 1000, or 0 for no intervals")


def check_thresholds(value: Any) -> Thresholds | None:
    """Return the thresholds, checked, or ``None``.

    Raises:
        TypeError: If they are not thresholds.
    """
    if value is None or isinstance(value, Thresholds):
        return value
    raise TypeError(
        f"thresholds= is {_kind(value)}; expected the result of lightning_gradmetrics.evaluation.fit_thresholds"
    )


def check_metrics(value: str | Iterable[str]) -> tuple[str, ...]:
    """Return the names of the metrics to log, checked.

    Raises:
        ValueError: If one is unknown.
    """
    if not isinstance(value, Iterable):
        raise ValueError(f"metrics={value!r}; expected names of metrics, as in metrics=('auroc', 'aurc')")
    names = (value,) if isinstance(value, str) else tuple(value)
    for name in names:
        task, _, metric = name.partition("_") if name.startswith(tuple(TASKS)) else ("", "", name)
        if metric not in (TASKS[task] if task else HIGHER_IS_BETTER):
            raise ValueError(
                f"metrics= names {name!r}; available: {', '.join(HIGHER_IS_BETTER)}, each also for a single task, as in "
                "'joint_auroc' or 'ood_fpr95'"
            )
    return names
