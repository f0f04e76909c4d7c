"""Checks of the callback's arguments, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from lightning_gradmetrics.evaluation import Thresholds
from lightning_gradmetrics.evaluation.metrics import METRICS, TASKS
from lightning_gradmetrics.language.sequence_evidence import TIED
from lightning_gradmetrics.results.table import RESERVED
from lightning_gradmetrics.scores import Score
from lightning_gradmetrics.scoring.evidence import parameter_filter

__all__ = [
    "DEFAULT_METRICS",
    "check_callable",
    "check_flag",
    "check_metrics",
    "check_name",
    "check_prefix",
    "check_resamples",
    "check_scores",
    "check_targets",
    "check_thresholds",
]

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
    if value is None or (isinstance(value, str) and value):
        return value
    problem = "empty" if value == "" else _kind(value)
    raise TypeError(
        f"{argument}= is {problem}; expected the name of a module in the model, as in {argument}={example!r}"
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
        if metric not in (TASKS[task] if task else METRICS):
            raise ValueError(
                f"metrics= names {name!r}; available: {', '.join(METRICS)}, each also for a single task, as in "
                "'joint_auroc' or 'ood_fpr95'"
            )
    return names


def check_scores(scores: Sequence[Score]) -> tuple[Score, ...]:
    """The scores.

    Raises:
        ValueError: If a name is empty, or is that of another column of the results.
    """
    for score in scores:
        if not score.name.strip():
            raise ValueError("scores= has a score with an empty name; expected a word, as in {'mine': 'energy'}")
        if score.name in RESERVED:
            raise ValueError(
                f"scores= has the name {score.name!r}, which is a column of the results already ({', '.join(RESERVED)}): rename "
                "the score, as in {'mine': 'energy'}"
            )
    return tuple(scores)


def check_flag(argument: str, value: Any) -> bool:
    """The value of a switch.

    Raises:
        TypeError: If it is neither true nor false.
    """
    if isinstance(value, bool):
        return value
    raise TypeError(f"{argument}={value!r}; expected True or False")


def check_targets(scores: Sequence[Score], model: nn.Module) -> None:
    """Refuse scores whose target matches no parameter of the model.

    Args:
        scores: The scores.
        model: The model that is scored.

    Raises:
        ValueError: If a pattern or a predicate chooses no parameter.
    """
    names = list(dict(model.named_parameters()))
    has_embedding = any(isinstance(module, nn.Embedding) for module in model.modules())
    for score in scores:
        for target in score.needs.gradients:
            accepts = parameter_filter(target)
            may_be_tied = target == TIED and has_embedding  # the first batch of texts shows which weights are tied
            is_known = may_be_tied or accepts is None or any(map(accepts, names))
            if not is_known:
                raise ValueError(
                    f"the target {target!r} of the score {score.name!r} chooses no parameter of {type(model).__name__}; its "
                    f"parameters are: {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}. Pass one of these names, a "
                    "pattern such as 'layer4.*', or 'all'"
                )
