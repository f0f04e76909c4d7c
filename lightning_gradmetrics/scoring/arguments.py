"""Types of the arguments of scores, and checks of values against their annotations."""

from __future__ import annotations

import math
import numbers
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["Allowed", "Count", "CountOrZero", "Norm", "NonNegative", "Positive", "Share", "annotations_of", "check"]


@dataclass(frozen=True)
class Allowed:
    """The values that an argument may take, for ``typing.Annotated``.

    Args:
        text: A description of the allowed values, such as ``"a number above 0"``.
        accepts: Whether a value of the right type is allowed.

    Example:
        >>> Even = Annotated[int, Allowed("an even number", lambda value: value % 2 == 0)]
        >>> check("my_score", {"size": 3}, {"size": Even})
        Traceback (most recent call last):
        ...
        ValueError: the score 'my_score' got size=3; allowed: an even number
    """

    text: str
    accepts: Callable[[Any], bool]


Positive = Annotated[float, Allowed("a finite number above 0", lambda value: 0 < value < math.inf)]
NonNegative = Annotated[float, Allowed("a finite number of at least 0", lambda value: 0 <= value < math.inf)]
Share = Annotated[float, Allowed("a number above 0 and at most 1", lambda value: 0 < value <= 1)]
Norm = Annotated[float, Allowed("the p of a p-norm, a number above 0 or inf", lambda value: value > 0)]
Count = Annotated[int, Allowed("a whole number of at least 1", lambda value: value >= 1)]
CountOrZero = Annotated[int, Allowed("a whole number of at least 0", lambda value: value >= 0)]

SIMPLE: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool)),
    float: ("a number", lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool)),
    str: ("text", lambda value: isinstance(value, str)),
    type(None): ("None", lambda value: value is None),
    Callable: ("a callable", callable),
}


def annotations_of(function: Callable[..., Any], *, plain: bool = False) -> dict[str, Any]:
    """Return the resolved annotations of a function or class; none if they use a name that is undefined at run time.

    Args:
        function: The function or class.
        plain: Whether to leave out the limits, so that ``Positive`` becomes ``float``.
    """
    try:
        return get_type_hints(function, include_extras=not plain)
    except (NameError, TypeError):
        return {}


def check(score: str, arguments: Mapping[str, Any], annotations: Mapping[str, Any]) -> None:
    """Check arguments against their annotations.

    Args:
        score: The score's name, for the message.
        arguments: The given arguments.
        annotations: Their resolved annotations; an argument without one, or with an unknown kind, is accepted.

    Raises:
        ValueError: If an argument has a value that its annotation does not allow.
    """
    for key, value in arguments.items():
        wanted = annotations.get(key, Any)
        if not _accepts(wanted, value):
            raise ValueError(f"the score {score!r} got {key}={value!r}; allowed: {', '.join(_words(wanted))}")


def _members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _accepts(annotation: Any, value: Any) -> bool:
    return any(_member_accepts(member, value) for member in _members(annotation))


def _member_accepts(member: Any, value: Any) -> bool:
    if get_origin(member) is Annotated:
        base, *extras = get_args(member)
        return _accepts(base, value) and all(limit.accepts(value) for limit in _limits(extras))
    if get_origin(member) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(member))
    _, accepts = SIMPLE.get(get_origin(member) or member, ("", lambda value: True))
    return accepts(value)


def _limits(extras: Iterable[Any]) -> list[Allowed]:
    """Return the limits among an annotation's extras."""
    return [extra for extra in extras if isinstance(extra, Allowed)]


def _words(annotation: Any) -> list[str]:
    """Return a description of the allowed values, one entry per alternative."""
    words: list[str] = []
    for member in _members(annotation):
        if get_origin(member) is Annotated:
            base, *extras = get_args(member)
            texts = [limit.text for limit in _limits(extras)]
            words += texts or _words(base)
        elif get_origin(member) is Literal:
            words += map(repr, get_args(member))
        else:
            words.append(SIMPLE.get(get_origin(member) or member, (str(member), None))[0])
    return words
