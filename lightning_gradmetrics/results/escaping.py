"""Makes control characters in names visible."""

from __future__ import annotations

import re

__all__ = ["literal", "visible"]


def visible(text: str) -> str:
    r"""Return the text with visible escapes instead of control characters, which a terminal would obey; newlines stay.

    Args:
        text: A name of a dataset, a score or a class.

    Example:
        >>> visible("\x1b[2Jscore")
        '\\x1b[2Jscore'
    """
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda match: repr(match.group())[1:-1], text)


def literal(text: str) -> str:
    r"""Return the text for matplotlib: dollar signs escaped, which it would parse as mathematics, and no control characters.

    Example:
        >>> literal("$x$")
        '\\$x\\$'
    """
    return visible(text).replace("$", r"\$")
