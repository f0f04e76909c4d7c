"""Building HTML from strings that come from users: everything is escaped unless it is already markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from typing import Union

__all__ = ["Child", "Markup", "breakable", "join", "prose", "tag", "void"]


class Markup(str):
    """A string that is HTML already and is not escaped again."""

    __slots__ = ()


Child = Union[str, int, float, None, "Iterable[Child]"]


def join(*children: Child) -> Markup:
    """Escape and concatenate; None is left out and iterables are flattened.

    Example:
        >>> join("a<b", None, [tag("i", "c"), 1])
        'a&lt;b<i>c</i>1'
    """
    return Markup("".join(_text(child) for child in children))


def breakable(name: str) -> Markup:
    """A name that a narrow column may break after an underscore, a dot or a slash.

    Example:
        >>> breakable("max_softmax")
        'max_<wbr>softmax'
    """
    return Markup(re.sub(r"([_./]+)(?=[^_./])", r"\1<wbr>", html.escape(name)))


def prose(text: str) -> Markup:
    """A sentence in which double backticks, as docstrings have them, mark code.

    Example:
        >>> prose("the norm ``|h| < 1``")
        'the norm <code>|h| &lt; 1</code>'
    """
    return Markup(re.sub(r"``(.+?)``", r"<code>\1</code>", html.escape(text)))


def _text(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str | int | float):
        return html.escape(str(child))
    return "".join(_text(item) for item in child)


def tag(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """An element. Attributes: a trailing underscore is dropped, others become hyphens; None and False are left out.

    Example:
        >>> tag("td", "1 < 2", class_="best", data_value=3, hidden=False)
        '<td class="best" data-value="3">1 &lt; 2</td>'
    """
    return Markup(f"{_start(name, attributes)}{join(*children)}</{name}>")


def void(name: str, /, **attributes: str | int | float | bool | None) -> Markup:
    """An element without content or end tag.

    Example:
        >>> void("img", alt="a < b")
        '<img alt="a &lt; b">'
    """
    return Markup(_start(name, attributes))


def _start(name: str, attributes: Mapping[str, str | int | float | bool | None]) -> str:
    parts = [f"<{name}"]
    for key, value in attributes.items():
        label = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(f" {label}")
        elif value is not None and value is not False:
            parts.append(f' {label}="{html.escape(str(value))}"')
    return f"{''.join(parts)}>"
